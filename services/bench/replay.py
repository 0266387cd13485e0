"""`seedrl bench replay`: sequences and priorities per second through a real replay service and work queue."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from services.bench.interruption import uninterrupted
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_measuring import Figures, measured
from shared.telemetry import configure_logging


def replay(config: ReplayBenchConfig) -> int:
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
    table = Table(title="replay", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in asdict(figures).items():
        shown = value if isinstance(value, str) else f"{value:,.0f}"
        table.add_row(name.replace("_", " "), shown)
    return table
