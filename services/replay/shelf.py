"""Table and limiter as one: what may be inserted and sampled now; knows neither clock nor network."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.replay.config import ReplayConfig
from services.replay.items import Refusal
from services.replay.limiter import RateLimiter
from services.replay.state import TableState
from services.replay.table import Inserted, Sampled, Table
from shared.algorithms.priorities import sequence_priorities
from shared.errors import ConfigurationError, Refused
from shared.wire.chunk_rows import Rows


class ShelfState(NamedTuple):
    """All of a shelf at one moment."""

    table: TableState
    limiter: Mapping[str, Any]
    largest_rows: int  # of any message so far


class Shelf:
    """The sequences of one run, in its proportion of samples to inserts."""

    def __init__(self, config: ReplayConfig, *, seed: int, state: ShelfState | None = None) -> None:
        """Starts empty, or goes on from `state`.

        Raises:
            ValueError: `state` is not whole, or of sequences of another length.
        """
        self._config = config
        self._is_full_of_bytes = False
        self.largest_rows = state.largest_rows if state is not None else 1
        limits: dict[str, Any] = {
            "samples_per_insert": config.replay_ratio,
            "min_size": config.min_replay_size,
            "error_buffer": self._error_buffer(self.largest_rows),
        }
        arguments: dict[str, Any] = {
            "capacity": config.replay_capacity,
            "max_bytes": config.replay_max_bytes,
            "priority_exponent": config.priority_exponent,
            "chunks_per_item": config.chunks_per_item,
            "chunk_stride": config.sequence_length // config.unroll,
            "chunk_steps": config.unroll,
            "priorities": partial(_priorities, config.burn_in, config.sequence_length, config.priority_eta),
            "seed": seed,
        }
        if state is None:
            self.table, self.limiter = Table(**arguments), RateLimiter(**limits)
        else:
            self.table = Table.from_state(state.table, **arguments)
            self.limiter = RateLimiter.from_state(state.limiter, size=self.table.size, **limits)

    def admit(self, rows: int) -> None:
        """Makes the error buffer large enough for messages of `rows` rows.

        Raises ConfigurationError when it was given and is too small.
        """
        if rows <= self.largest_rows:
            return
        self.largest_rows = rows
        self.limiter.error_buffer = self._error_buffer(rows)

    def may_insert(self, rows: int) -> bool:
        """Whether a message of `rows` rows may be inserted now, whatever it completes."""
        return self.limiter.may_insert(rows, size=self.table.size)

    def insert(self, rows: Rows, *, now: float) -> Inserted:
        """Inserts a message. Raises ValueError as `Table.insert`; nothing is changed then."""
        limit, size = self._config.replay_max_bytes, sum(map(len, rows.records))
        self._is_full_of_bytes = 0 < limit < self.table.total_bytes + size
        inserted = self.table.insert(
            rows.header.stream_id,
            rows.header.first_row,
            rows.header.number,
            rows=rows.records,
            td_errors=rows.td_errors,
            valid=~rows.reset_steps,
            now=now,
        )
        self.limiter.inserted(inserted.items)
        return inserted

    def check_sample(self, n: int) -> None:
        """Raises Refused when a sample of n can never be given."""
        if n > self._config.replay_capacity:
            raise Refused(
                f"a batch of {n:,} sequences; replay holds {self._config.replay_capacity:,} at most"
            )
        reachable = 2 * self.limiter.error_buffer - self.largest_rows * self._config.replay_ratio
        if n > reachable:
            raise Refused(
                f"a batch of {n:,} sequences; with --batch-size {self._config.batch_size} of replay and "
                f"--rate-limiter-error-buffer {self.limiter.error_buffer:g} there can be {int(reachable):,}"
            )

    def may_sample(self, n: int) -> bool:
        """Whether n sequences may be sampled now."""
        return self.limiter.may_sample(n, size=self.table.size)

    def sample(self, n: int, *, now: float) -> Sampled:
        """Draws n sequences; only where `may_sample`."""
        sampled = self.table.sample(n, now=now)
        self.limiter.sampled(n)
        return sampled

    def update(self, keys: NDArray[np.uint64], priorities: NDArray[np.floating]) -> Counter[Refusal]:
        """New priorities; how many were refused, and why."""
        return self.table.update(keys, priorities)

    def words(self) -> str:
        """What waits and for what, else "free"."""
        return self.shortage() or self.limiter.words(
            size=self.table.size, rows=self.largest_rows, batch_size=self._config.batch_size
        )

    def shortage(self) -> str:
        """Why sampling can never begin, where a message has found no room before it did; else empty."""
        if not self._is_full_of_bytes or self.table.size >= self.limiter.min_size:
            return ""
        return (
            f"samples wait for --min-replay-size {self.limiter.min_size:,}, but --replay-max-bytes "
            f"{self._config.replay_max_bytes:,} holds no more than {self.table.size:,} sequences"
        )

    def state(self) -> ShelfState:
        """All there is; copies indexes, no rows."""
        return ShelfState(self.table.state(), self.limiter.state(), self.largest_rows)

    def _error_buffer(self, rows: int) -> float:
        least, given = self._config.least_error_buffer(rows), self._config.rate_limiter_error_buffer
        if 0 < given < least:
            raise ConfigurationError(
                f"--rate-limiter-error-buffer {given:g} is too small for messages of {rows} rows and "
                f"--batch-size {self._config.batch_size}: at least {least:g}, or 0"
            )
        return given or least


def _priorities(
    burn_in: int, length: int, eta: float, td_errors: NDArray[np.float32], valid: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Of the steps after burn-in; those of the last chunk that the sequence does not reach do not count."""
    trained = slice(burn_in, burn_in + length)
    return sequence_priorities(td_errors[:, trained], valid[:, trained], eta)
