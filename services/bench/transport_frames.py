"""Frames of real Pong, recorded once, for senders without environments; knows no stream."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from services.actor.environments import GroupMaker
from services.actor.stepping import SteppedGroup, Transition
from shared.types import Array

_ENVIRONMENTS, _STEPS = 16, 200
_KEPT_BYTES = 256 * 2**20  # of the steps that a sender holds; larger observations come around sooner
_FLAGS = ("terminated", "truncated", "is_first")


def record(path: Path) -> int:
    """Plays Pong at random and writes what was seen; returns how many actions it has.

    Raises UnsupportedEnvironment without ale-py.
    """
    seeds = np.random.SeedSequence(0)
    group = SteppedGroup(GroupMaker(env="ALE/Pong-v5", group_size=_ENVIRONMENTS), seeds=seeds)
    actions = np.random.default_rng(0)
    try:
        transitions = [group.reset()]
        for _ in range(_STEPS - 1):
            action = actions.integers(group.spec.num_actions, size=_ENVIRONMENTS)
            transitions.append(group.step(action))
    finally:
        group.close()
    recorded = {name: _steps([getattr(each, name) for each in transitions], np.uint8) for name in _FLAGS}
    recorded["reward"] = _steps([each.reward for each in transitions], np.dtype("<f4"))
    recorded["frames"] = _steps([each.observation[0] for each in transitions], np.uint8)
    np.savez(path, allow_pickle=False, **recorded)
    return group.spec.num_actions


def recorded_steps(path: Path, *, observation: tuple[int, ...], group_size: int) -> list[Transition]:
    """What `record` wrote as the steps of `group_size` environments; the first one is a reset of all."""
    size = math.prod(observation)
    count = max(2, min(_STEPS, _KEPT_BYTES // (group_size * size)))
    with np.load(path) as recorded:
        arrays = {name: recorded[name][:count] for name in recorded.files}
    return [
        _transition({name: array[t] for name, array in arrays.items()}, size, group_size)
        for t in range(count)
    ]


def _transition(step: dict[str, Array], size: int, group_size: int) -> Transition:
    frames = step["frames"].reshape(_ENVIRONMENTS, -1)
    fitted = np.stack([np.resize(frame, size) for frame in frames])  # row by row: it stays that environment's
    rows = np.resize(np.arange(_ENVIRONMENTS), group_size)
    resets = int(step["is_first"][rows].sum())
    return Transition(
        observation=[fitted[rows].tobytes()],
        reward=step["reward"][rows].tobytes(),
        **{name: step[name][rows].tobytes() for name in _FLAGS},
        steps=group_size - resets,
        reset_steps=resets,
        episodes=0,
        restarts=0,
    )


def _steps(chunks: list[bytes], dtype: Any) -> Array:
    """[steps, environments] or [steps, environments, bytes]."""
    array: Array = np.frombuffer(b"".join(chunks), dtype).reshape(len(chunks), _ENVIRONMENTS, -1)
    return array.squeeze(-1) if array.shape[-1] == 1 else array
