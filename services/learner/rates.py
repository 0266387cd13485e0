"""Speeds over the last seconds; pure: the time is passed in."""

from collections import deque
from typing import NamedTuple

WINDOW_SECONDS = 30.0


class Sample(NamedTuple):
    """Totals at one moment."""

    time: float  # seconds, monotonic
    steps: int
    updates: int
    training_seconds: float
    waiting_seconds: float  # for batches


class Rates:
    """Differences between the newest totals and those of half a minute before."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window = window_seconds
        self._samples: deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        """Takes the totals of now; to be called about each second."""
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.time - self._samples[1].time >= self._window:
            self._samples.popleft()

    def per_second(self) -> dict[str, float]:
        """`steps_per_second`, `updates_per_second`, `training_share` and `waiting_share` (of the time)."""
        names = ("steps_per_second", "updates_per_second", "training_share", "waiting_share")
        if len(self._samples) < 2:
            return dict.fromkeys(names, 0.0)
        first, last = self._samples[0], self._samples[-1]
        seconds = max(last.time - first.time, 1e-9)
        return {
            name: (now - before) / seconds
            for name, now, before in zip(names, last[1:], first[1:], strict=True)
        }
