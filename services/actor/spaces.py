"""From Gymnasium's spaces to the run's environment spec, and from batched observations to bytes on the wire.

Leaves are named by their path: "observation" for a plain space, "key/…" in a Dict, "0/…" in a Tuple.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

from services.actor.finite import check_finite
from services.actor.results import WrongResult
from shared.errors import UnsupportedEnvironment
from shared.specs import EnvironmentSpec, LeafSpec
from shared.types import Array
from shared.wire.limits import DTYPES

_MISFITS = (LookupError, TypeError, ValueError)  # what observations that do not fit their space end in


@dataclass(frozen=True)
class _Leaf:
    path: tuple[Any, ...]  # keys from the root to the leaf
    space: Space[Any]
    spec: LeafSpec

    @cached_property
    def label(self) -> str:
        """What messages call it."""
        return f"observation {self.spec.name!r}"

    @property
    def start(self) -> int:
        """Smallest value of a Discrete leaf; sent as 0."""
        return int(self.space.start) if isinstance(self.space, spaces.Discrete) else 0

    def of(self, observation: Any) -> Any:
        """Its value in `observation`."""
        for key in self.path:
            observation = observation[key]
        return observation

    def check_fits(self, observation: Any, rows: tuple[int, ...]) -> None:
        """Raises WrongResult where its value in `observation`, [*rows, …], is not as its space says."""
        for key in self.path:
            try:
                observation = observation[key]
            except (LookupError, TypeError) as error:
                leaf = f" of {self.spec.name!r}" if len(self.path) > 1 else ""
                raise WrongResult(f"the observation lacks the key {key!r}{leaf}") from error
        try:
            array: Array = np.asarray(observation)
        except ValueError as error:
            raise WrongResult(f"{self.label} is no array: {error}") from error
        shape = (*rows, *self.spec.shape)
        if array.shape != shape:
            raise WrongResult(f"{self.label} has shape {list(array.shape)}; its space says {list(shape)}")
        self.fitted(array, np.dtype(self.spec.dtype))

    def fitted(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """`array` as `dtype`; raises WrongResult where that is another kind of number, or too small a one, or
        where a Discrete space does not hold a value.
        """
        if array.dtype != dtype:
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise WrongResult(f"{self.label} is {array.dtype.name}; its space says {dtype.name}")
            with np.errstate(over="ignore"):
                fitted = array.astype(dtype)
            if dtype.kind in "iu" and not np.array_equal(fitted, array):
                raise WrongResult(f"{self.label} is {array.dtype.name} with values beyond {dtype.name}")
            array = fitted
        if self.spec.n:
            self._check_discrete(array)
        return array

    def _check_discrete(self, array: Array) -> None:
        first, last = self.start, self.start + self.spec.n - 1
        beyond = (array < first) | (array > last)
        if beyond.any():
            raise WrongResult(f"{self.label} is {array[beyond].flat[0]}; its space says {first} … {last}")


def environment_spec(observation_space: Space[Any], action_space: Space[Any]) -> EnvironmentSpec:
    """Spec of an environment with these single (not batched) spaces. Raises UnsupportedEnvironment."""
    if not isinstance(action_space, spaces.Discrete):
        raise UnsupportedEnvironment(
            f"action space {_shown(action_space)} is not supported; only Discrete is"
        )
    return EnvironmentSpec(
        observation=tuple(leaf.spec for leaf in _leaves(observation_space)), num_actions=int(action_space.n)
    )


def check_fits(observation_space: Space[Any], observation: Any, *, rows: tuple[int, ...] = ()) -> None:
    """Raises WrongResult for a leaf that is missing or has another shape or dtype than its space says.

    Too slow for every step, it is asked once something went wrong. `rows`: (B,) where observations are
    batched; the space never is.
    """
    for leaf in _leaves(observation_space):
        leaf.check_fits(observation, rows)


class ObservationEncoder:
    """Turns batched observations of one space into raw little-endian bytes, leaf by leaf."""

    def __init__(self, observation_space: Space[Any], *, group_size: int) -> None:
        """Takes the single (not batched) observation space. Raises UnsupportedEnvironment."""
        self._space, self._rows = observation_space, (group_size,)
        self._leaves = [
            (leaf, (group_size, *leaf.spec.shape), np.dtype(leaf.spec.dtype).newbyteorder("<"))
            for leaf in _leaves(observation_space)
        ]

    def __call__(self, observation: Any, *, into: Sequence[Array] | None = None) -> list[bytes]:
        """Bytes of each leaf, [B, …] in C order.

        Raises UnsupportedEnvironment on another shape, NotFinite for floats that are not, WrongResult where
        a key is missing, or a leaf is no number or one that its space does not hold.
        `into`: arrays that are filled instead, per leaf [B, …]; no bytes are returned then.
        """
        encoded = []
        try:
            for number, (leaf, shape, dtype) in enumerate(self._leaves):
                array: Array = np.asarray(leaf.of(observation))
                if array.shape != shape:
                    raise UnsupportedEnvironment(
                        f"{leaf.label} of a group has shape {list(array.shape)}; its space says {list(shape)}"
                    )
                array = leaf.fitted(array, dtype)
                if leaf.start:
                    array = array - leaf.start
                if into is None:
                    encoded.append(array.tobytes())
                else:
                    np.copyto(into[number], array)
                if dtype.kind == "f":
                    check_finite(leaf.label, array)
        except _MISFITS:
            check_fits(self._space, observation, rows=self._rows)
            raise
        return encoded


class ObservationCheck:
    """Whether one environment's observations, as they would be sent, are finite and have its space's keys,
    shapes and kinds of number. Bounds of a Box are not looked at.
    """

    def __init__(self, observation_space: Space[Any]) -> None:
        """Takes the environment's own space. Raises UnsupportedEnvironment."""
        self._space = observation_space
        self._leaves = [(leaf, np.dtype(leaf.spec.dtype)) for leaf in _leaves(observation_space)]

    def __call__(self, observation: Any) -> None:
        """Raises NotFinite, and WrongResult where a key is missing, a leaf no number, or a shape another."""
        try:
            for leaf, dtype in self._leaves:
                values = np.asarray(leaf.of(observation))
                if values.shape != leaf.spec.shape:
                    raise ValueError("another shape than the space's")
                values = leaf.fitted(values, dtype)
                if dtype.kind == "f":
                    check_finite(leaf.label, values)
        except _MISFITS:
            check_fits(self._space, observation)
            raise


class ActionDecoder:
    """Turns 0-based actions into those of the action space."""

    def __init__(self, action_space: Space[Any]) -> None:
        """Takes the single (not batched) action space, a Discrete one."""
        assert isinstance(action_space, spaces.Discrete)
        self._start = int(action_space.start)
        self._dtype = np.dtype(action_space.dtype)

    def __call__(self, action: NDArray[np.int64]) -> Array:
        """[B] actions in the space's own dtype, its start added; an array of the caller's own."""
        return (action + self._start).astype(self._dtype, copy=False)


def _leaves(space: Space[Any]) -> list[_Leaf]:
    leaves = list(_walk(space, ()))
    names = [leaf.spec.name for leaf in leaves]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UnsupportedEnvironment(f"two observation leaves would be named {repeated!r}; rename a key")
    if not leaves:
        raise UnsupportedEnvironment(f"observation space {_shown(space)} holds nothing")
    return leaves


def _walk(space: Space[Any], path: tuple[Any, ...]) -> Iterator[_Leaf]:
    if isinstance(space, spaces.Dict):
        for key, child in space.spaces.items():
            if not str(key):
                raise UnsupportedEnvironment("a key of the observation is empty; rename it")
            yield from _walk(child, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, child in enumerate(space.spaces):
            yield from _walk(child, (*path, index))
    else:
        name = "/".join(str(key) for key in path) or "observation"
        yield _Leaf(path=path, space=space, spec=_leaf_spec(name, space))


def _leaf_spec(name: str, space: Space[Any]) -> LeafSpec:
    if isinstance(space, spaces.Discrete):
        n = int(space.n)
        return LeafSpec(name=name, dtype="int64", shape=(), low=(0.0,), high=(float(n - 1),), n=n)
    if not isinstance(space, spaces.Box):
        raise UnsupportedEnvironment(
            f"observation {name!r}: space {_shown(space)} is not supported; Box, Discrete, Dict and Tuple are"
        )
    dtype = np.dtype(space.dtype)
    if dtype.name not in DTYPES:
        raise UnsupportedEnvironment(f"observation {name!r}: dtype {dtype.name} is not supported")
    if 0 in space.shape:
        raise UnsupportedEnvironment(f"observation {name!r}: shape {list(space.shape)} holds no values")
    low, high = _bounds(space.low), _bounds(space.high)
    return LeafSpec(name=name, dtype=dtype.name, shape=tuple(space.shape), low=low, high=high)


def _bounds(values: Array) -> tuple[float, ...]:
    flat = values.astype(np.float64).ravel()
    return (float(flat[0]),) if (flat == flat[0]).all() else tuple(flat.tolist())


def _shown(space: Space[Any]) -> str:
    """One short line for a space: its own words, cut where arrays make them long."""
    words = " ".join(repr(space).split())
    return words if len(words) <= 80 else f"{words[:77]}…"
