"""The newest frames of every slot, on the device: stacks are cut from them instead of being put together."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.inference.places import Places, Run
from shared.networks.unroll import SIGNED
from shared.types import Array

_STACKS = 3  # how many stacks long a strip is


class _Part(NamedTuple):
    """Neighbouring slots whose strips are filled alike."""

    slots: slice
    rows: slice  # of the batch
    place: int  # of the newest frame in each strip


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

    def push(self, places: Places, frames: Tensor, *, is_first: Array) -> Tensor:
        """Remembers the newest frames and returns the stacks that they end.

        Args:
            places: of n slots, each at most once.
            frames: [n, …] on the device.
            is_first: [n] bool in host memory; what a slot showed before is zero from there on.

        Returns:
            [n, S, …], oldest frame first; it may lie in memory that the next `push` changes.
        """
        parts = [part for run in places.runs for part in self._parts(run)]
        parts = [self._advanced(part) for part in parts]
        for slots, rows, place in parts:
            firsts = is_first[rows]
            for row in firsts.nonzero()[0].tolist():
                self._strips[slots.start + row, place - self._before : place] = 0
        frames = frames.view(self._strips.dtype)
        if len(parts) > 1 and self._is_by_index:
            return self._by_index(places, frames).view(self._dtype)
        return self._by_part(parts, frames).view(self._dtype)

    def _parts(self, run: Run) -> Iterator[_Part]:
        """`run`, cut where the strips are not filled alike, as they mostly are."""
        places = self._next[run.slots]
        start = 0
        for stop in [*((places[1:] != places[:-1]).nonzero()[0] + 1).tolist(), len(places)]:
            yield _Part(
                slice(run.slots.start + start, run.slots.start + stop),
                slice(run.rows.start + start, run.rows.start + stop),
                int(places[start]),
            )
            start = stop

    def _advanced(self, part: _Part) -> _Part:
        """Room for another frame in these strips."""
        slots, rows, place = part
        if place == self._length:
            self._strips[slots, : self._before] = self._strips[slots, -self._before :]
            place = self._before
        self._next[slots] = place + 1
        return _Part(slots, rows, place)

    def _by_part(self, parts: list[_Part], frames: Tensor) -> Tensor:
        stacks = []
        for slots, rows, place in parts:
            self._strips[slots, place] = frames[rows]
            stacks.append(self._strips[slots, place - self._before : place + 1])
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def _by_index(self, places: Places, frames: Tensor) -> Tensor:
        newest = places.slots * self._length + self._next[places.slots] - 1
        stacks = newest[:, None] + np.arange(-self._before, 1)
        flat = self._strips.flatten(0, 1)
        flat.index_copy_(0, torch.from_numpy(newest).to(flat.device, non_blocking=True), frames)
        index = torch.from_numpy(stacks.ravel()).to(flat.device, non_blocking=True)
        return flat.index_select(0, index).view(*stacks.shape, *flat.shape[1:])
