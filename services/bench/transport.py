"""`seedrl bench transport`: rows per second and latency through a real inference service and work queue."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from services.bench.transport_config import TransportConfig
from services.bench.transport_measuring import Figures, measured
from shared.config import load
from shared.errors import SeedrlError
from shared.telemetry import configure_logging


def transport(config: TransportConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", "auto", "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as directory:
        try:
            figures = uvloop.run(_interruptible(config, Path(directory)))
        except _Interrupted as interrupted:
            return 128 + interrupted.number
    if config.as_json:
        print(orjson.dumps(asdict(figures)).decode())
    else:
        Console().print(_table(figures))
    return 0


class _Interrupted(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def _interruptible(config: TransportConfig, directory: Path) -> Figures:
    """Raises _Interrupted, when everything has ended, after SIGINT or SIGTERM."""
    task = asyncio.create_task(measured(config, directory))
    numbers: list[int] = []

    def interrupt(number: int) -> None:
        numbers.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
    await asyncio.wait({task})
    if numbers:
        raise _Interrupted(numbers[0])
    return task.result()


def _table(figures: Figures) -> Table:
    """A line per figure."""
    table = Table(title="transport", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in asdict(figures).items():
        shown = "×".join(map(str, value)) if isinstance(value, tuple) else _number(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(arguments: Sequence[str]) -> int:
    """Runs it without `seedrl`; returns the exit status."""
    try:
        return transport(load(TransportConfig, arguments, prog="python -m services.bench.transport"))
    except SeedrlError as error:
        print(f"seedrl: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
