"""Learning curves for TensorBoard; the x axis is environment steps."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from torch.utils.tensorboard import SummaryWriter

from services.learner.episodes import Episode
from shared.telemetry import get_logger

DIRECTORY = "tensorboard"
_RETRY_SECONDS = 60.0

log = get_logger(__name__)


class Curves:
    """Writes points; to be used by one thread at a time. The directory is created with the first point."""

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / DIRECTORY
        self._writer: SummaryWriter | None = None
        self._again_at = 0.0

    def close(self) -> None:
        """Writes out what is buffered."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    def write(self, steps: int, values: Mapping[str, float | None], episodes: Sequence[Episode]) -> None:
        """A point at `steps` for each of `values` that is a finite number, and for the `episodes`' means.

        Where the disk does not take it, it is missing; that is logged.
        """
        if monotonic() < self._again_at:
            return
        try:
            self._write(steps, values, episodes)
        except OSError as error:
            log.error("no curves", directory=str(self._directory), reason=error.strerror)
            self._writer = None  # its thread has ended with the error
            self._again_at = monotonic() + _RETRY_SECONDS  # each try makes a file

    def _write(self, steps: int, values: Mapping[str, float | None], episodes: Sequence[Episode]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._directory))
        points = dict(values)
        if episodes:
            points["episodes/return"] = sum(each.episode_return for each in episodes) / len(episodes)
            points["episodes/length"] = sum(each.length for each in episodes) / len(episodes)
        for name, value in points.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, steps)
        self._writer.flush()  # else a learner that is killed takes up to two minutes of its curves with it
