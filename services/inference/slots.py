"""Which rows of the device's per-environment tensors belong to which group."""

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]  # [B]


class SlotAllocator:
    """Hands out the lowest free slots, contiguous ones where there are, so that the tensors stay dense."""

    def __init__(self, capacity: int) -> None:
        self._taken = np.zeros(capacity, dtype=np.bool_)

    @property
    def capacity(self) -> int:
        """Slots there are."""
        return int(self._taken.size)

    @property
    def free(self) -> int:
        """Slots nobody has."""
        return int(self._taken.size - self._taken.sum())

    def allocate(self, count: int) -> Slots | None:
        """[count] ascending slots, or None when fewer are free."""
        if count > self.free:
            return None
        start = self._first_gap(count)
        slots = (
            np.flatnonzero(~self._taken)[:count] if start is None else np.arange(start, start + count)
        ).astype(np.int64)
        self._taken[slots] = True
        return slots

    def release(self, slots: Slots) -> None:
        """Frees what `allocate` returned."""
        assert self._taken[slots].all(), "slots are released once"
        self._taken[slots] = False

    def _first_gap(self, count: int) -> int | None:
        edges = np.flatnonzero(np.diff(np.concatenate(([True], self._taken, [True])).astype(np.int8)))
        begins, ends = edges[::2], edges[1::2]  # of the runs of free slots
        wide = np.flatnonzero(ends - begins >= count)
        return int(begins[wide[0]]) if wide.size else None
