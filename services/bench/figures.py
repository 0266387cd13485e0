"""Figures by name, as a table for people."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
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
    if isinstance(value, tuple):
        return "×".join(map(str, value))
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
