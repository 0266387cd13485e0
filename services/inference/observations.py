"""What a group observed since its open chunk began, in host memory; stacks of frames are views of that."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.specs import RunSpec
from shared.types import Array, Leaves


class Observed(NamedTuple):
    """A chunk's share of it."""

    observation: Leaves  # [B, T + 1, …]
    history: Leaves  # [B, S − 1, …], as the policy saw them; empty dict when S = 1
    is_first: NDArray[np.bool_]  # [B, T + 1]


class Observations:
    """[B, S − 1 + T + 1, …] of each leaf: the S − 1 frames before the chunk, and its own.

    The former are zero where they are from before an episode.
    """

    def __init__(self, spec: RunSpec, group_size: int) -> None:
        self._spec = spec
        self._group_size = group_size
        self._before = spec.network.frame_stack - 1
        # Frames in the chunk that are zero for now, and what they are.
        self._hidden: list[tuple[Array, Array]] = []
        self._begin()
        for leaf in self._leaves.values():
            leaf[:, : self._before] = 0

    def _begin(self) -> None:
        steps = self._spec.unroll + 1
        self._leaves: Leaves = {
            leaf.name: np.empty((self._group_size, self._before + steps, *leaf.shape), leaf.dtype)
            for leaf in self._spec.environment.observation
        }
        self.is_first = np.zeros((self._group_size, steps), np.bool_)
        self.count = 0  # observations in the open chunk

    @property
    def is_full(self) -> bool:
        """Whether row T is there."""
        return self.count == self._spec.unroll + 1

    def append(self, observation: Leaves, is_first: Array) -> None:
        """Copies the newest observations [B, …]; a chunk that is full by then is dropped."""
        if self.is_full:
            self.cut()
        self._show()
        for name, leaf in observation.items():
            self._leaves[name][:, self._before + self.count] = leaf
        self.is_first[:, self.count] = is_first
        self.count += 1

    def stacks(self) -> Leaves:
        """[B, S, …] that end with the newest frames, zero before an episode's first one.

        Views, good until the next `append` or `cut`, and not to be written to: until then the frames before
        the episode are zero in the chunk, too.
        """
        newest = self.count - 1
        start = max(1, newest - self._before + 1)  # what came before the chunk is zero where it has to be
        recent = self.is_first[:, start : newest + 1]
        if not self._hidden and np.count_nonzero(recent):
            for row, step in np.argwhere(recent).tolist():
                for leaf in self._leaves.values():
                    frames = leaf[row, newest : self._before + start + step]
                    self._hidden.append((frames, frames.copy()))
                    frames[...] = 0
        return {name: leaf[:, newest : newest + self._before + 1] for name, leaf in self._leaves.items()}

    def _show(self) -> None:
        for frames, values in reversed(self._hidden):  # they may overlap
            frames[...] = values
        self._hidden.clear()

    def cut(self) -> Observed:
        """What a full chunk holds; its row T is row 0 of the next one, in memory of its own."""
        before, is_first, leaves = self._before, self.is_first, self._leaves
        newest = self.stacks()
        self._begin()
        for name, leaf in newest.items():
            self._leaves[name][:, : before + 1] = leaf
        self._show()
        self.is_first[:, 0] = is_first[:, -1]
        self.count = 1
        return Observed(
            observation={name: leaf[:, before:] for name, leaf in leaves.items()},
            history={name: leaf[:, :before] for name, leaf in leaves.items()} if before else {},
            is_first=is_first,
        )
