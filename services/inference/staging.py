"""Requests packed into a batch in host memory, so that one copy per leaf goes to the device."""

import numpy as np
import torch

from services.inference.assembler import StepArrays
from services.inference.slots import Slots
from shared.networks.leaves import torch_dtype
from shared.specs import EnvironmentSpec
from shared.types import Array, Leaves


class Staging:
    """Arrays [rows, …] and the tensors that share their memory; pinned for a CUDA device.

    `in_place`: observations are not copied but stay in the groups' memory until they are answered.
    """

    def __init__(
        self, environment: EnvironmentSpec, *, rows: int, pinned: bool, in_place: bool = False
    ) -> None:
        def tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            return torch.empty((rows, *shape), dtype=torch_dtype(dtype), pin_memory=pinned)

        self.rows = rows
        self.reward = tensor((), "float32")
        self.is_first = tensor((), "bool")
        self.greedy = tensor((), "bool")
        self.epsilon = tensor((), "float32")
        self.slots = tensor((), "int64")
        self._reward, self.is_first_array, self.greedy_array, self.slots_array = (
            each.numpy() for each in (self.reward, self.is_first, self.greedy, self.slots)
        )
        self._epsilon = self.epsilon.numpy()
        self._in_place = in_place
        self._observation = (
            {}
            if in_place
            else {leaf.name: tensor(leaf.shape, leaf.dtype) for leaf in environment.observation}
        )
        self._leaves = {name: leaf.numpy() for name, leaf in self._observation.items()}
        self._parts: dict[int, Leaves] = {}  # by offset, of the groups' own

    def place(self, offset: int, step: StepArrays, *, slots: Slots, greedy: bool, epsilon: Array) -> None:
        """Takes in a group's Step for the rows from `offset`; `epsilon`: [B]."""
        rows = slice(offset, offset + len(slots))
        if self._in_place:
            self._parts[offset] = step.observation
        for name, array in self._leaves.items():
            array[rows] = step.observation[name]
        self._reward[rows] = step.reward
        self.is_first_array[rows] = step.is_first
        self.greedy_array[rows] = greedy
        self._epsilon[rows] = epsilon
        self.slots_array[rows] = slots

    def observation(self, rows: int) -> dict[str, torch.Tensor]:
        """[rows, …] of each leaf, in host memory."""
        if not self._in_place:
            return {name: leaf[:rows] for name, leaf in self._observation.items()}
        parts = list(self._parts.values())  # in the order of their offsets, since batches are filled in order
        return {name: torch.from_numpy(_joined([part[name] for part in parts])) for name in parts[0]}

    def close_gap(self, offset: int, rows: int, *, end: int) -> None:
        """Moves the rows from `offset + rows` to `end` up to `offset`."""
        small = (self._reward, self.is_first_array, self.greedy_array, self._epsilon, self.slots_array)
        for array in (*self._leaves.values(), *small):
            array[offset : end - rows] = array[offset + rows : end]
        self._parts.pop(offset, None)
        self._parts = {each - rows if each > offset else each: part for each, part in self._parts.items()}

    def clear(self) -> None:
        """Lets go of the groups' memory."""
        self._parts.clear()


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class StagingPool:
    """Staging areas that are used again; there are as many as batches wait or run at once.

    Each stream has at most one request, so together they never hold more than all environments and what runs.
    """

    def __init__(
        self, environment: EnvironmentSpec, *, rows: int, pinned: bool, in_place: bool = False
    ) -> None:
        self._environment = environment
        self._rows = rows
        self._pinned = pinned
        self._in_place = in_place
        self._free: list[Staging] = []

    def take(self, rows: int) -> Staging:
        """One with room for a batch whose first group has `rows` rows."""
        if rows > self._rows:
            self._rows = rows
            self._free.clear()
        if self._free:
            return self._free.pop()
        return Staging(self._environment, rows=self._rows, pinned=self._pinned, in_place=self._in_place)

    def give(self, staging: Staging) -> None:
        """Takes back one that nobody uses any more."""
        staging.clear()
        if staging.rows >= self._rows:
            self._free.append(staging)
