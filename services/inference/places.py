"""Where the rows of a batch lie in tensors that have a row per slot."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.inference.slots import Slots

_REMEMBERED = 64  # sets of slots


class Run(NamedTuple):
    """Rows of a batch whose slots are neighbours."""

    slots: slice
    rows: slice


class Places:
    """Reads and writes tensors [slots, …] for `slots` [n], in runs of neighbours, since those are fast."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        breaks = ((slots[1:] - slots[:-1] != 1).nonzero()[0] + 1).tolist()
        starts, stops = [0, *breaks], [*breaks, len(slots)]
        self.slots = slots
        self.runs = [
            Run(slice(first := int(slots[start]), first + stop - start), slice(start, stop))
            for start, stop in zip(starts, stops, strict=True)
        ]
        self._device = device

    @cached_property
    def end(self) -> int:
        """One more than the highest slot."""
        return max(int(run.slots.stop) for run in self.runs)

    def read(self, tensor: Tensor) -> Tensor:
        """[n, …], a view where all rows are neighbours."""
        if len(self.runs) == 1:
            return tensor[self.runs[0].slots]
        return tensor.index_select(0, self._index)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Puts `values` [n, …] where they belong."""
        if len(self.runs) > 1 and self._device.type == "cuda":
            tensor.index_copy_(0, self._index, values)
            return
        for slots, rows in self.runs:  # on a CPU 20 times faster than by index
            tensor[slots] = values[rows]

    @cached_property
    def _index(self) -> Tensor:
        return torch.from_numpy(self.slots).to(self._device, non_blocking=True)


def remembered_places(device: torch.device) -> Callable[[Slots], Places]:
    """What gives the Places of `slots`; mostly known ones: the same groups meet in batches."""

    @lru_cache(_REMEMBERED)
    def places(slots: bytes) -> Places:
        return Places(np.frombuffer(slots, np.int64).copy(), device)

    return lambda slots: places(slots.tobytes())
