"""The section of a document that a comparison writes, between two marker comments; pure but for the file."""

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Measured, ratio, thousands

BEGIN = "<!-- peers: begin, written by benchmarks/peers.py -->"
END = "<!-- peers: end -->"
_EMPTY = f"# Performance\n\n## Beside other systems\n\n{BEGIN}\n{END}\n"


def write_between_markers(path: Path, text: str) -> None:
    """Puts `text` between the markers in `path`, which is made when it is missing. Raises ComparisonError."""
    document = document_with(path, text)
    try:
        path.write_text(document)
    except OSError as error:
        raise ComparisonError(f"cannot write {path}: {error.strerror}") from error


def document_with(path: Path, text: str) -> str:
    """The document in `path`, or an empty one, with `text` between its markers.

    Raises ComparisonError when it cannot be read or written, or has not one pair of markers, in order.
    """
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ComparisonError(f"cannot write {path}")
    try:
        document = path.read_text() if path.exists() else _EMPTY
    except OSError as error:
        raise ComparisonError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = document.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in inside + after or END in before + after:
        raise ComparisonError(f"{path} must hold one line '{BEGIN}' and, after it, one '{END}'")
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


def comparison(measured: Sequence[Measured], *, conditions: str) -> str:
    """A table of all figures, the ratios to the last contestant, and under which `conditions`."""
    *others, peer = measured
    rows = [
        f"| {each.name} | {each.median:,.0f} | {thousands(each.steps_per_second)} | {each.settings} |"
        for each in measured
    ]
    lines = [
        "| | environment steps/s, median | each round | settings |",
        "|---|---|---|---|",
        *rows,
        "",
        *(_ratio_line(each, peer) for each in others),
        "",
        conditions,
    ]
    return "\n".join(lines)


def _ratio_line(ours: Measured, peer: Measured) -> str:
    times = ratio(ours, peer)
    rounds = ", ".join(f"{value:.2f}" for value in times.by_round)
    return f"* {ours.name} ÷ {peer.name}: **{times.of_medians:.2f}** (by round: {rounds})"
