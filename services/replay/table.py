"""Prioritized sequences over chunk rows; knows neither clock, network nor what the bytes say.

Items are sampled with P(i) = p_i^α / Σ p^α (Schaul et al. 2016, arXiv 1511.05952, section 3.3) and removed in
the order in which they came.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.replay.items import Items, Refusal, Removed
from services.replay.state import TableState
from services.replay.store import ChunkRows, KeptRow

# Of [n, L] absolute TD errors and [n, L] steps that count, the priorities [n]; L = chunks_per_item · T.
Priorities = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.floating]]

# With jumps this far apart, keys given after one restart and after another from the same state do not meet.
_JUMPS = (1 << 12, 1 << 24)


class Inserted(NamedTuple):
    """What became of the rows of one chunk message."""

    items: int  # completed and inserted
    removed: Removed  # to make room
    gaps: int  # rows before which chunks are missing
    stale: int  # rows dropped: delivered again, or overtaken by a later chunk


class Sampled(NamedTuple):
    """Items drawn independently, with replacement."""

    keys: NDArray[np.uint64]  # [n], generation << 32 | slot
    probabilities: NDArray[np.float64]  # [n], P(i)
    size: int  # N, items there were
    rows: list[tuple[bytes, ...]]  # [n][chunks_per_item]
    ages: NDArray[np.float64]  # [n], seconds
    uses: NDArray[np.int64]  # [n], how often each was sampled, this time included


class Table:
    """At most `capacity` items of at most `max_bytes` together; the oldest make room."""

    def __init__(
        self,
        *,
        capacity: int,
        max_bytes: int,
        priority_exponent: float,
        chunks_per_item: int,
        chunk_stride: int,
        chunk_steps: int,
        priorities: Priorities,
        seed: int,
    ) -> None:
        """Starts empty.

        Args:
            capacity: items at most.
            max_bytes: bytes of all rows at most, those of unfinished items included; 0 is no bound.
            priority_exponent: α; 0 samples all alike.
            chunks_per_item: consecutive chunks of one row of a stream that make an item.
            chunk_stride: an item starts at chunks whose number is a multiple of it.
            chunk_steps: T of a chunk.
            priorities: gives items their initial priorities, finite and not negative.
            seed: of the draws.

        Raises:
            ValueError: a value that cannot be.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative: {max_bytes}")
        self._items = Items(capacity=capacity, length=chunks_per_item, exponent=priority_exponent)
        self._store = ChunkRows(
            chunks_per_item=chunks_per_item, chunk_stride=chunk_stride, chunk_steps=chunk_steps
        )
        self.capacity, self.max_bytes = capacity, max_bytes
        self._shape = (chunks_per_item, chunk_stride, chunk_steps)
        self._priorities = priorities
        # By slot, the rows that the store keeps: one look-up for each item drawn instead of one for each row.
        self._data: list[tuple[bytes, ...]] = [()] * capacity
        self._rng = np.random.default_rng(seed)
        self.inserts = 0
        self.samples = 0

    @property
    def size(self) -> int:
        """Items there are."""
        return self._items.size

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self._store.bytes

    @property
    def rows(self) -> int:
        """Rows there are, each counted once."""
        return len(self._store)

    @property
    def streams(self) -> int:
        """Streams whose runs may go on."""
        return self._store.streams

    def insert(
        self,
        stream_id: str,
        first_row: int,
        number: int,
        *,
        rows: Sequence[bytes],
        td_errors: NDArray[np.floating],
        valid: NDArray[np.bool_],
        now: float,
    ) -> Inserted:
        """Adds the R rows of a chunk message and the items they complete.

        Args:
            stream_id: the stream.
            first_row: which of the stream's rows the first one is.
            number: the chunk's number within the stream.
            rows: [R], the bytes of each.
            td_errors: [R, T].
            valid: [R, T], the steps that count.
            now: seconds since the epoch, of which ages are told.

        Raises:
            ValueError: values that no chunk has, or more bytes than `max_bytes`; nothing is changed.
        """
        errors = self._checked(number, first_row, rows, td_errors, valid)
        complete: list[tuple[KeptRow, ...]] = []
        gaps = stale = 0
        for row, (data, row_errors, steps) in enumerate(
            zip(rows, errors, valid.copy(), strict=True), first_row
        ):
            added = self._store.add(
                stream_id, row, number, data=data, td_errors=row_errors, valid=steps, now=now
            )
            gaps += added.gap
            stale += added.stale
            if added.complete:
                complete.append(added.complete)
        items, removed = self._append(complete, now)
        self.inserts += items
        return Inserted(items, removed, gaps, stale)

    def sample(self, n: int, *, now: float) -> Sampled:
        """Draws n items, independently and with replacement; if all have priority 0, all alike.

        Raises:
            ValueError: n is below 1, or there is no item.
        """
        if n < 1 or not self.size:
            raise ValueError(f"{n} items cannot be drawn of {self.size}")
        slots, probabilities = self._items.draw(n, self._rng)
        self.samples += n
        return Sampled(
            keys=self._items.keys(slots),
            probabilities=probabilities,
            size=self.size,
            rows=[self._data[slot] for slot in slots.tolist()],
            ages=self._items.ages(slots, now),
            uses=self._items.uses(slots),
        )

    def update(self, keys: NDArray[np.uint64], priorities: NDArray[np.floating]) -> Counter[Refusal]:
        """Gives items new priorities; of a key named twice the last one counts.

        Args:
            keys: [n].
            priorities: [n].

        Returns:
            How many were refused and why; the others are in force.

        Raises:
            ValueError: the shapes or types differ from these; nothing is changed.
        """
        return self._items.update(keys, priorities)

    def drop_silent(self, since: float) -> int:
        """Forgets the unfinished items of streams not heard of since then; returns how many streams."""
        return self._store.drop_silent(since)

    def state(self) -> TableState:
        """The table as it is now; costs a copy of the indexes, none of the rows."""
        state = self._store.state()
        counts = np.array([self.inserts, self.samples, *self._shape], np.int64)
        arrays = {**state.arrays, **self._items.arrays(), "counts": counts}
        return TableState(arrays=arrays, streams=state.streams, rows=state.rows)

    @classmethod
    def from_state(cls, state: TableState, **arguments: Any) -> "Table":
        """Goes on from `state`, with the arguments of a new table; capacity, bytes and α may be others.

        Keys given after the state was taken name nothing here, whatever came since.

        Raises:
            ValueError: `state` is of other chunks or not whole, or an argument cannot be.
        """
        table = cls(**arguments)
        inserts, samples, *shape = state.array("counts", (5,), "i").tolist()
        if tuple(shape) != table._shape:
            raise ValueError(
                f"the state has chunks per item, stride and steps {tuple(shape)}, not {table._shape}"
            )
        table._items.restore(state, jump=int(np.random.default_rng().integers(*_JUMPS)))
        slots = table._items.oldest(table.size)
        table._store.restore(state, table._items.rows(slots))
        table._hold(slots)
        table.inserts, table.samples = inserts, samples
        table._rng = np.random.default_rng([arguments["seed"], inserts, samples])
        table._make_room(0, 0.0)
        return table

    def _checked(
        self,
        number: int,
        first_row: int,
        rows: Sequence[bytes],
        td_errors: NDArray[np.floating],
        valid: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        if number < 0 or first_row < 0 or not all(rows):
            raise ValueError("numbers must not be negative and rows not be empty")
        shape = (len(rows), self._shape[2])
        if td_errors.shape != shape or valid.shape != shape or valid.dtype != np.bool_:
            raise ValueError(f"td_errors and valid must be {shape}, not {td_errors.shape} and {valid.shape}")
        with np.errstate(over="ignore"):
            errors: NDArray[np.float32] = np.abs(td_errors).astype(np.float32)
        if not np.isfinite(errors).all():
            raise ValueError("td_errors must be finite")
        size = sum(map(len, rows))
        if 0 < self.max_bytes < size:
            raise ValueError(f"{size} bytes of rows are more than the {self.max_bytes} of the whole table")
        return errors

    def _append(self, complete: list[tuple[KeptRow, ...]], now: float) -> tuple[int, Removed]:
        """Makes items of complete rows and room for them; how many, and what was removed for it."""
        items, removed = 0, []
        for start in range(0, len(complete), self.capacity):  # a message may complete more than fit
            part = complete[start : start + self.capacity]
            removed.append(self._make_room(len(part), now))
            if self._too_many_bytes:  # of these alone
                self._store.release(kept.slot for item in part for kept in item)
                continue
            items += len(part)
            td_errors = np.array([[kept.td_errors for kept in item] for item in part]).reshape(len(part), -1)
            valid = np.array([[kept.valid for kept in item] for item in part]).reshape(len(part), -1)
            rows = [[kept.slot for kept in item] for item in part]
            self._hold(self._items.append(rows, self._priorities(td_errors, valid), now))
        removed.append(self._make_room(0, now))
        ages, uses = zip(*removed, strict=True)
        return items, Removed(np.concatenate(ages), np.concatenate(uses))

    def _hold(self, slots: NDArray[np.int64]) -> None:
        for slot, rows in zip(slots.tolist(), self._items.rows(slots).tolist(), strict=True):
            self._data[slot] = self._store.read(rows)

    def _make_room(self, n: int, now: float) -> Removed:
        """Removes the oldest items until n more fit, then what waits for the rest of an item."""
        removed = 0
        while removed < self.size and (self.size - removed + n > self.capacity or self._too_many_bytes):
            slot = self._items.slot_by_age(removed)
            self._data[slot] = ()
            self._store.release(self._items.rows(np.array([slot]))[0].tolist())
            removed += 1
        told = self._items.remove_oldest(removed, now)
        while self._too_many_bytes and not self.size and self._store.streams:
            self._store.drop_most_silent()
        return told

    @property
    def _too_many_bytes(self) -> bool:
        return 0 < self.max_bytes < self._store.bytes
