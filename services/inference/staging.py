"""Host memory in which requests are packed into a batch, so that one copy per leaf goes to the device."""

import numpy as np
import torch

from services.inference.assembler import StepArrays
from services.inference.slots import Slots
from shared.specs import EnvironmentSpec
from shared.types import Array


def torch_dtype(name: str) -> torch.dtype:
    """The tensor dtype of a numpy dtype's name."""
    return torch.from_numpy(np.empty(0, dtype=name)).dtype


class Staging:
    """Arrays [rows, …] and the tensors that share their memory; pinned for a CUDA device."""

    def __init__(self, environment: EnvironmentSpec, *, rows: int, pinned: bool) -> None:
        def tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            return torch.empty((rows, *shape), dtype=torch_dtype(dtype), pin_memory=pinned)

        self.rows = rows
        self.observation = {leaf.name: tensor(leaf.shape, leaf.dtype) for leaf in environment.observation}
        self.reward = tensor((), "float32")
        self.is_first = tensor((), "bool")
        self.greedy = tensor((), "bool")
        self.epsilon = tensor((), "float32")
        self.slots = tensor((), "int64")
        self._leaves = {name: leaf.numpy() for name, leaf in self.observation.items()}
        self._reward, self.is_first_array, self.greedy_array, self.slots_array = (
            each.numpy() for each in (self.reward, self.is_first, self.greedy, self.slots)
        )
        self._epsilon = self.epsilon.numpy()

    def place(self, offset: int, step: StepArrays, *, slots: Slots, greedy: bool, epsilon: Array) -> None:
        """Copies a group's Step to the rows from `offset`; `epsilon`: [B]."""
        rows = slice(offset, offset + len(slots))
        for name, leaf in step.observation.items():
            self._leaves[name][rows] = leaf
        self._reward[rows] = step.reward
        self.is_first_array[rows] = step.is_first
        self.greedy_array[rows] = greedy
        self._epsilon[rows] = epsilon
        self.slots_array[rows] = slots

    def close_gap(self, offset: int, rows: int, *, end: int) -> None:
        """Moves the rows from `offset + rows` to `end` up to `offset`."""
        for array in (*self._all(), self._epsilon):
            array[offset : end - rows] = array[offset + rows : end]

    def _all(self) -> list[Array]:
        return [*self._leaves.values(), self._reward, self.is_first_array, self.greedy_array, self.slots_array]


class StagingPool:
    """Staging areas that are used again; there are as many as batches wait or run at once.

    Each stream has at most one request, so together they never hold more than all environments and what runs.
    """

    def __init__(self, environment: EnvironmentSpec, *, rows: int, pinned: bool) -> None:
        self._environment = environment
        self._rows = rows
        self._pinned = pinned
        self._free: list[Staging] = []

    def take(self, rows: int) -> Staging:
        """One with room for a batch whose first group has `rows` rows."""
        if rows > self._rows:
            self._rows = rows
            self._free.clear()
        if self._free:
            return self._free.pop()
        return Staging(self._environment, rows=self._rows, pinned=self._pinned)

    def give(self, staging: Staging) -> None:
        """Takes back one that nobody uses any more."""
        if staging.rows >= self._rows:
            self._free.append(staging)
