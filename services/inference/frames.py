"""The newest frames of every slot, on the device: stacks are cut from them instead of being put together."""

import numpy as np
import torch
from torch import Tensor

from services.inference.slots import Slots
from shared.networks.unroll import SIGNED
from shared.types import Array

_STACKS = 3  # how many stacks long a strip is


class FrameMemory:
    """A strip of frames [W, …] per slot for one observation leaf; a stack is S neighbouring frames of it.

    Where a strip is full its last S − 1 frames move to its front, so a step writes one frame and, once in
    W − S + 1 steps, S − 1 more. What `push` returns equals `stack_frames` over the same history.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        stack: int,
        device: torch.device,
        by_index: bool | None = None,
    ) -> None:
        """`by_index`: scattered slots are addressed by index; by default on a GPU, where launches cost."""
        self._before = stack - 1
        self._length = _STACKS * stack
        self._dtype = dtype
        self._is_by_index = device.type == "cuda" if by_index is None else by_index
        self._strips = torch.zeros((0, self._length, *shape), dtype=SIGNED.get(dtype, dtype), device=device)
        self._next = np.zeros(0, np.int64)  # per slot: where its next frame goes

    def grow(self, slots: int) -> None:
        """Makes room for `slots` slots; what is remembered stays."""
        more = slots - len(self._next)
        self._strips = torch.cat([self._strips, self._strips.new_zeros((more, *self._strips.shape[1:]))])
        self._next = np.concatenate([self._next, np.full(more, self._before)])

    def push(self, slots: Slots, frames: Tensor, *, is_first: Array) -> Tensor:
        """Remembers the newest frames and returns the stacks that they end.

        Args:
            slots: [n], each at most once.
            frames: [n, …] on the device.
            is_first: [n] bool in host memory; what a slot showed before is zero from there on.

        Returns:
            [n, S, …], oldest frame first; it may lie in memory that the next `push` changes.
        """
        full = slots[self._next[slots] == self._length]
        if full.size:
            for each, _ in _runs(full):
                self._strips[each, : self._before] = self._strips[each, -self._before :]
            self._next[full] = self._before
        places = self._next[slots]
        for row in np.flatnonzero(is_first):
            self._strips[slots[row], places[row] - self._before : places[row]] = 0
        self._next[slots] += 1
        frames = frames.view(self._strips.dtype)
        runs = _runs(slots, places)
        if len(runs) > 1 and self._is_by_index:
            return self._by_index(slots, places, frames).view(self._dtype)
        return self._by_run(runs, places, frames).view(self._dtype)

    def _by_run(self, runs: list[tuple[slice, slice]], places: Array, frames: Tensor) -> Tensor:
        stacks = []
        for slots, rows in runs:
            place = int(places[rows.start])
            self._strips[slots, place] = frames[rows]
            stacks.append(self._strips[slots, place - self._before : place + 1])
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def _by_index(self, slots: Slots, places: Array, frames: Tensor) -> Tensor:
        newest = slots * self._length + places
        stacks = newest[:, None] + np.arange(-self._before, 1)
        flat = self._strips.flatten(0, 1)
        flat.index_copy_(0, torch.from_numpy(newest).to(flat.device, non_blocking=True), frames)
        index = torch.from_numpy(stacks.ravel()).to(flat.device, non_blocking=True)
        return flat.index_select(0, index).view(*stacks.shape, *flat.shape[1:])


def _runs(slots: Slots, places: Array | None = None) -> list[tuple[slice, slice]]:
    """(slots, rows) of neighbouring slots, with equal `places` where those are given."""
    breaks = np.diff(slots) != 1
    if places is not None:
        breaks |= np.diff(places) != 0
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    stops = [*starts[1:], len(slots)]
    return [
        (slice(int(slots[start]), int(slots[start]) + stop - start), slice(start, stop))
        for start, stop in zip(starts, stops, strict=True)
    ]
