"""`seedrl bench transport`: rows per second and latency through a real inference service and work queue."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from services.bench.interruption import uninterrupted
from services.bench.transport_config import TransportConfig
from services.bench.transport_measuring import Figures, measured
from shared.telemetry import configure_logging


def transport(config: TransportConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", "auto", "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as directory:
        figures = uninterrupted(measured(config, Path(directory)))
    if config.as_json:
        print(orjson.dumps(asdict(figures)).decode())
    else:
        Console().print(_table(figures))
    return 0


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
