"""A benchmark's figures: measured in a temporary directory, printed for people or as JSON."""

import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from shared.runtime import run_command
from shared.telemetry import configure_logging

Measure = Callable[[Path], Coroutine[Any, Any, Any]]


def print_figures(title: str, measure: Measure, *, as_json: bool) -> int:
    """Prints the dataclass that `measure` returns, called with a directory; the exit status."""
    configure_logging("warning", "auto", "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as directory:
        figures = asdict(run_command(measure(Path(directory))))
    if as_json:
        print(orjson.dumps(figures).decode())
    else:
        Console().print(_table(title, figures))
    return 0


def _table(title: str, figures: Mapping[str, Any]) -> Table:
    """A line per figure."""
    table = Table(title=title, title_justify="left", show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _shown(value))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "×".join(map(str, value))
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
