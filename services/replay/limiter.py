"""Keeps samples per insert near a ratio by withholding one or the other; knows neither clock nor table.

The rule is that of Reverb's SampleToInsertRatio (Cassirer et al. 2021, arXiv 2102.04736, section 3.4):
the balance inserts × ratio − samples may stray by the error buffer to either side of an offset.
"""

import math
from collections.abc import Mapping
from typing import Any


def smallest_error_buffer(*, samples_per_insert: float, rows_per_chunk: int, batch_size: int) -> float:
    """The least buffer with which whole chunks and whole batches keep going past one another."""
    return 2 * max(rows_per_chunk * samples_per_insert, batch_size)


class RateLimiter:
    """Says whether items may be inserted and sampled; told of what was, it keeps the counts.

    With an error buffer of at least half of `n · samples_per_insert + batch size`, inserts of n and samples
    are never withheld both. Below `min_size` items nothing is sampled and inserts are free.
    """

    def __init__(self, *, samples_per_insert: float, min_size: int, error_buffer: float) -> None:
        """Starts with nothing inserted.

        Args:
            samples_per_insert: items sampled for each item inserted.
            min_size: items the table must hold before the first sample.
            error_buffer: how far the samples may be ahead or behind, in items sampled.

        Raises:
            ValueError: a value that could withhold both sides for ever.
        """
        if not (math.isfinite(samples_per_insert) and samples_per_insert > 0):
            raise ValueError(f"samples_per_insert must be above 0, not {samples_per_insert}")
        if min_size < 1:
            raise ValueError(f"min_size must be at least 1, not {min_size}")
        least = max(1.0, samples_per_insert)
        if not (math.isfinite(error_buffer) and error_buffer >= least):
            raise ValueError(f"error_buffer must be at least {least:g}, not {error_buffer}")
        self.samples_per_insert = samples_per_insert
        self.min_size = min_size
        self.error_buffer = error_buffer
        self.inserts = 0
        self.samples = 0
        self._offset = samples_per_insert * min_size

    @property
    def balance(self) -> float:
        """Samples still owed to what was inserted; between −error_buffer and error_buffer once it runs."""
        return self.inserts * self.samples_per_insert - self.samples - self._offset

    def may_insert(self, n: int = 1, *, size: int) -> bool:
        """Whether n items more may be inserted into a table of `size` items."""
        return size < self.min_size or self.balance + n * self.samples_per_insert <= self.error_buffer

    def may_sample(self, n: int = 1, *, size: int) -> bool:
        """Whether n items may be sampled from a table of `size` items."""
        return size >= self.min_size and self.balance - n >= -self.error_buffer

    def inserted(self, n: int) -> None:
        """Counts n items inserted."""
        self.inserts += n

    def sampled(self, n: int) -> None:
        """Counts n items sampled."""
        self.samples += n

    def words(self, *, size: int, rows: int = 1, batch_size: int = 1) -> str:
        """What waits and for what, of inserts of `rows` items and samples of `batch_size`; else "free"."""
        if size < self.min_size:
            return f"samples wait: {size:,} of {self.min_size:,} items"
        if not self.may_sample(batch_size, size=size):
            missing = (batch_size - self.balance - self.error_buffer) / self.samples_per_insert
            return f"samples wait: {math.ceil(missing):,} more items to be inserted"
        if not self.may_insert(rows, size=size):
            missing = self.balance + rows * self.samples_per_insert - self.error_buffer
            return f"inserts wait: {math.ceil(missing):,} more items to be sampled"
        return "free"

    def state(self) -> dict[str, Any]:
        """What `from_state` needs; numbers only."""
        return {
            "samples_per_insert": self.samples_per_insert,
            "min_size": self.min_size,
            "inserts": self.inserts,
            "samples": self.samples,
            "offset": self._offset,
        }

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        *,
        samples_per_insert: float,
        min_size: int,
        error_buffer: float,
        size: int,
    ) -> "RateLimiter":
        """Goes on from `state` with a table of `size` items.

        With another ratio or minimum than the state's, the counts so far do not count against the new ratio:
        neither side has to make up for what was right when it happened, nor for the free inserts up to a
        larger minimum.

        Raises:
            ValueError: a value of `state` or an argument cannot be.
        """
        limiter = cls(samples_per_insert=samples_per_insert, min_size=min_size, error_buffer=error_buffer)
        try:
            old_ratio, old_min_size = float(state["samples_per_insert"]), int(state["min_size"])
            inserts, samples, offset = int(state["inserts"]), int(state["samples"]), float(state["offset"])
        except (KeyError, TypeError, OverflowError, ValueError) as error:
            raise ValueError(f"no limiter's state: {error!r}") from error
        if min(inserts, samples) < 0 or not (math.isfinite(offset) and math.isfinite(old_ratio)):
            raise ValueError("no limiter's state: its counts must be finite and not negative")
        limiter.inserts, limiter.samples = inserts, samples
        if (old_ratio, old_min_size) == (samples_per_insert, min_size):
            limiter._offset = offset
        elif samples or inserts >= old_min_size:
            balance = inserts * old_ratio - samples - offset
            kept = min(max(balance, -error_buffer), error_buffer)
            to_come = inserts + max(0, min_size - size)
            limiter._offset = to_come * samples_per_insert - samples - kept
        return limiter
