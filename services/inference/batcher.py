"""When which requests leave as one batch; knows neither tensors, streams nor a clock."""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(eq=False)
class Entry(Generic[K]):
    """One group's request within a batch."""

    key: K
    offset: int  # its first row in the batch
    rows: int
    arrived: float  # seconds on the caller's clock


@dataclass(eq=False)
class Batch(Generic[K]):
    """Requests in order of arrival, packed without gaps."""

    entries: list[Entry[K]] = field(default_factory=list)
    rows: int = 0

    @property
    def oldest(self) -> float:
        """When the request arrived that has waited longest."""
        return self.entries[0].arrived


class Batcher(Generic[K]):
    """Packs requests into batches at arrival and says when the first of them leaves.

    A batch leaves when it is full, when its oldest request has waited `max_batch_delay` seconds, or as soon
    as nobody is awaited. Awaited is a key that was answered (`expect`) and has not asked since; who is not
    answered (withheld actions) or gone (`forget`) is not awaited. Requests leave in order of arrival: one
    that does not fit into the last batch opens the next; one larger than `max_batch_size` goes alone.
    """

    def __init__(self, *, max_batch_size: int, max_batch_delay: float) -> None:
        self._max_batch_size = max_batch_size
        self._max_batch_delay = max_batch_delay
        self._batches: deque[Batch[K]] = deque()
        self._where: dict[K, Batch[K]] = {}
        self._awaited: set[K] = set()

    def expect(self, key: K) -> None:
        """`key` was answered: its next request is awaited."""
        self._awaited.add(key)

    def add(self, key: K, rows: int, now: float) -> tuple[Batch[K], Entry[K]]:
        """Places a request of `key`, which has none waiting, in a batch."""
        assert key not in self._where, "a stream has one request at a time"
        self._awaited.discard(key)
        if not self._batches or self._batches[-1].rows + rows > self._max_batch_size:
            self._batches.append(Batch())
        batch = self._batches[-1]
        entry = Entry(key, batch.rows, rows, now)
        batch.entries.append(entry)
        batch.rows += rows
        self._where[key] = batch
        return batch, entry

    def forget(self, key: K) -> tuple[Batch[K], Entry[K]] | None:
        """`key` is gone. Returns the batch its request was waiting in and that entry, or None.

        The entries behind it have moved up; the caller moves their rows. A batch left empty is dropped.
        """
        self._awaited.discard(key)
        batch = self._where.pop(key, None)
        if batch is None:
            return None
        index = next(i for i, entry in enumerate(batch.entries) if entry.key == key)
        gone = batch.entries.pop(index)
        batch.rows -= gone.rows
        for entry in batch.entries[index:]:
            entry.offset -= gone.rows
        if not batch.entries:
            self._batches.remove(batch)
        return batch, gone

    def ready(self, now: float) -> bool:
        """Whether the first batch leaves at `now`."""
        deadline = self.deadline()
        return deadline is not None and now >= deadline

    def deadline(self) -> float | None:
        """When the first batch leaves if nothing happens, not after now if at once; None without one."""
        if not self._batches:
            return None
        first = self._batches[0]
        if self.is_full or not self._awaited:
            return first.oldest
        return first.oldest + self._max_batch_delay

    @property
    def is_full(self) -> bool:
        """Whether the first batch takes no more, so that nothing is won by letting it wait."""
        return len(self._batches) > 1 or (
            bool(self._batches) and self._batches[0].rows >= self._max_batch_size
        )

    def take(self) -> Batch[K]:
        """Removes the first batch."""
        batch = self._batches.popleft()
        for entry in batch.entries:
            del self._where[entry.key]
        return batch
