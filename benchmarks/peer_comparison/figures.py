"""From counter readings to steps per second; pure.

The unit is the environment step: one decision of the policy that was trained on. Emulator frames are steps
times the frame skip.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median
from typing import NamedTuple

from benchmarks.peer_comparison.errors import ComparisonError

FRAME_SKIP = 4
_REPORT = re.compile(
    r"\[(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\]\[\d+\] Fps is .*?Total num frames: (?P<frames>\d+)\."
)


class Reading(NamedTuple):
    """A system's own counters at one moment."""

    seconds: float  # on any clock that all readings of one run share
    steps: int  # since the start
    chunks: int = 0  # messages of trajectories that are done with, where the system counts them
    refused_chunks: int = 0  # those of them that were not trained on


class Window(NamedTuple):
    """What happened between two readings."""

    first: Reading
    last: Reading

    @property
    def steps_per_second(self) -> float:
        """Trained steps per second; those in refused chunks are taken out by the chunks' share."""
        first, last = self
        chunks = last.chunks - first.chunks
        refused = last.refused_chunks - first.refused_chunks
        trained_share = 1.0 - refused / chunks if chunks else 1.0
        return (last.steps - first.steps) * trained_share / (last.seconds - first.seconds)


class Measured(NamedTuple):
    """One contestant's figures."""

    name: str
    settings: str
    steps_per_second: tuple[float, ...]  # one for each round

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return median(self.steps_per_second)


class Ratio(NamedTuple):
    """One contestant's speed by another's."""

    of_medians: float
    by_round: tuple[float, ...]


def ratio(ours: Measured, theirs: Measured) -> Ratio:
    """How many times faster `ours` is than `theirs`."""
    rounds = zip(ours.steps_per_second, theirs.steps_per_second, strict=True)
    return Ratio(ours.median / theirs.median, tuple(mine / other for mine, other in rounds))


def sample_factory_readings(log: str, *, batch_steps: int) -> list[Reading]:
    """All reports in a log of Sample Factory, oldest first; the log's clock must be UTC.

    Its learner adds every batch of `batch_steps` to the frames, times the frame skip. Raises ComparisonError
    when they are no multiple of that: then they count something else.
    """
    readings = []
    for report in _REPORT.finditer(log):
        frames = int(report["frames"])
        if frames % (batch_steps * FRAME_SKIP):
            raise ComparisonError(
                f"Sample Factory reports {frames} frames, no multiple of {batch_steps} × {FRAME_SKIP}"
            )
        moment = datetime.strptime(report["time"], "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)
        readings.append(Reading(moment.timestamp(), frames // FRAME_SKIP))
    return readings


def thousands(values: Sequence[float]) -> str:
    """Steps per second as a table shows them."""
    return ", ".join(f"{value:,.0f}" for value in values)
