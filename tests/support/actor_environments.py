"""Environments that misbehave, and native vector environments with every kind of autoreset.

For use as `tests.support.actor_environments:Id-v0`; importing this module registers them.
"""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from tests.support.counting_environment import CountingEnvironment, Crash

MODULE = __name__


class TroubleEnvironment(CountingEnvironment):
    """A counting environment that makes trouble in step `at` of its life, or in the first reset after it.

    `trouble`: step, reset, close (raise), exit (SystemExit), cancel (CancelledError), die (the process is
    gone), hang, nan (in the observation), inf (as reward), nan_reset (in the reset's observation), made (its
    constructor hangs), cancel_made (or raises CancelledError).
    `marker` is a file that is there once any instance has made the trouble; without one each makes it.
    """

    def __init__(self, *, trouble: str = "", at: int = 5, marker: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._trouble, self._at, self._marker = trouble, at, marker
        self._steps = 0
        if trouble == "cancel_made":
            raise asyncio.CancelledError
        if trouble == "made":
            time.sleep(3600)

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        self._steps += 1
        makes_trouble = self._steps == self._at and "reset" not in self._trouble and self._may()
        if makes_trouble:
            self._make_trouble()
        observation, reward, *rest = super().step(action)
        if makes_trouble and self._trouble == "nan":
            observation[1] = np.nan
        if makes_trouble and self._trouble == "inf":
            reward = float("inf")
        return observation, reward, *rest

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        if self._trouble == "reset" and self._steps >= self._at and self._may():
            raise Crash("told to crash in reset")
        observation, info = super().reset(seed=seed, options=options)
        if self._trouble == "nan_reset" and self._steps >= self._at and self._may():
            observation[1] = np.nan
        return observation, info

    def close(self) -> None:
        if self._trouble == "close":
            raise Crash("told to crash in close")

    def _may(self) -> bool:
        if not self._marker:
            return True
        try:
            Path(self._marker).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _make_trouble(self) -> None:
        match self._trouble:
            case "step" | "close":
                raise Crash("told to crash in step")
            case "cancel":
                raise asyncio.CancelledError
            case "exit":
                sys.exit("the simulator's window was closed")
            case "die":
                os._exit(9)
            case "hang":
                time.sleep(3600)


class BareVectorEnvironment(VectorEnv[Any, Any, Any]):
    """One Box row each, steps counted; has no metadata of its own and says no autoreset mode.

    `raise_at`: the step that crashes; `end_at`: the step that terminates all rows, whose reset has NaN for
    rewards; `nan_at`: the step whose last observation is NaN, or with `nan_reward` the last reward.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        raise_at: int = 0,
        end_at: int = 0,
        nan_at: int = 0,
        nan_reward: bool = False,
    ) -> None:
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 1000, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = spaces.Box(0, 1000, (num_envs, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([2] * num_envs)
        self._raise_at, self._end_at = raise_at, end_at
        self._nan_at, self._nan_reward = nan_at, nan_reward
        self._steps = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return self._observation(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._steps += 1
        if self._steps == self._raise_at:
            raise Crash("the vector environment was told to crash")
        if self._end_at and self._steps == self._end_at + 1:
            self._steps = 0  # but reward and flags, which mean nothing now, are sloppy
        ended = np.full(self.num_envs, self._end_at and self._steps in (0, self._end_at), np.bool_)
        observation, reward = self._observation(), np.full(self.num_envs, 7.0 if self._steps else np.nan)
        if self._nan_at and self._steps == self._nan_at:
            (reward if self._nan_reward else observation[:, 0])[-1] = np.nan
        return observation, reward, ended, ended & (self._steps == 0), {}

    def _observation(self) -> NDArray[np.float32]:
        return np.full((self.num_envs, 1), self._steps, np.float32)


class NextStepVectorEnvironment(BareVectorEnvironment):
    """Says NEXT_STEP in metadata of its own."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's attribute


class SameStepVectorEnvironment(BareVectorEnvironment):
    """Says SAME_STEP in metadata of its own."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - gymnasium's attribute


class ChoosingVectorEnvironment(SyncVectorEnv):
    """Takes its autoreset mode; SAME_STEP unless it is told."""

    def __init__(self, num_envs: int = 1, *, autoreset_mode: Any = AutoresetMode.SAME_STEP) -> None:
        super().__init__([CountingEnvironment] * num_envs, autoreset_mode=autoreset_mode)


class SpacesEnvironment(gymnasium.Env[Any, Any]):
    """Any spaces at all; observations are samples, remembered in `seen`."""

    def __init__(self, *, observation_space: Any = None, action_space: Any = None) -> None:
        self.observation_space = observation_space or spaces.Text(5)
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, False, False, {}


class OddEnvironment(gymnasium.Env[Any, Any]):
    """Breaks Gymnasium's interface from step `at` of its life on, or in every reset; "b" may be of integers.

    `odd`: step4 (no truncated), step_none, reset_bare (no info), key (lacks "b"), shape, transposed, dtype,
    wide (a larger type, and value) or words (of "b"); flags (arrays of one), flag_pairs (of two).
    """

    def __init__(self, *, odd: str, at: int = 1, integers: bool = False) -> None:
        kind = np.uint8 if odd in ("dtype", "wide") or integers else np.float32
        self.observation_space = spaces.Dict(
            {"a": spaces.Box(0, 9, (1,), np.float32), "b": spaces.Box(0, 9, (2, 3), kind)}
        )
        self.action_space = spaces.Discrete(2)
        self._kind = kind
        self._odd, self._at, self._steps = odd, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observation() if self._odd == "reset_bare" else (self._observation(), {})

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps >= self._at and self._odd.startswith("step"):
            return (self._observation(), 1.0, False, {}) if self._odd == "step4" else None
        sizes = {"flags": 1, "flag_pairs": 2}
        ended: Any = np.zeros(sizes[self._odd], bool) if self._odd in sizes else False
        return self._observation(), 1.0, ended, ended, {}

    def _observation(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"a": np.zeros(1, np.float32), "b": np.zeros((2, 3), self._kind)}
        if self._steps < self._at:
            return parts
        match self._odd:
            case "key":
                del parts["b"]
            case "shape":
                parts["b"] = parts["b"][0]
            case "transposed":
                parts["b"] = parts["b"].T
            case "dtype":
                parts["b"] = parts["b"] + 0.5
            case "wide":
                parts["b"] = np.full((2, 3), 300, np.uint16)
            case "words":
                parts["b"] = [["left"] * 3] * 2
        return parts


class OddVectorEnvironment(BareVectorEnvironment):
    """`odd`: step4, reset_bare, key, column (a reward of shape [B, 1]), or writes (into its actions)."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's attribute

    def __init__(self, num_envs: int = 1, *, odd: str) -> None:
        super().__init__(num_envs)
        self._odd = odd
        self.single_observation_space = spaces.Dict({"b": spaces.Box(0, 1000, (1,), np.float32)})

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        observation, info = super().reset(seed=seed, options=options)
        return observation if self._odd == "reset_bare" else ({"b": observation}, info)

    def step(self, actions: Any) -> Any:
        if self._odd == "writes":
            actions[:] = 0
        observation, reward, terminated, truncated, info = super().step(actions)
        if self._odd == "column":
            return {"b": observation}, reward[:, None], terminated, truncated, info
        if self._odd == "writes":
            return {"b": observation}, reward, terminated, truncated, info
        if self._odd == "step4":
            return {"b": observation}, reward, terminated, info
        return {"c": observation}, reward, terminated, truncated, info


class TalkativeEnvironment(CountingEnvironment):
    """Its infos have other keys, lengths and types from step to step."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        return super().reset(seed=seed, options=options)[0], {"legal": np.arange(3), "goal": 2**70}

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = super().step(action)
        info = {"legal": np.arange(int(observation[-1])), "goal": "reached" if terminated else {"far": 1}}
        return observation, reward, terminated, truncated, info


class LayoutEnvironment(CountingEnvironment):
    """Keeps its state in the argument that it was given."""

    def __init__(self, *, layout: list[int]) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 99, (2,), np.float32)
        self._layout = layout

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        return np.array(self._layout, np.float32), super().reset(seed=seed, options=options)[1]

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        self._layout[0] += 1
        return np.array(self._layout, np.float32), *super().step(action)[1:]


_NAPS = 20


class SlowEnvironment(CountingEnvironment):
    """Takes `seconds` for a step; of a time in which its process stands still it notices little.

    Before that, `making_seconds` to be made.
    """

    def __init__(self, *, seconds: float, making_seconds: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._seconds = seconds
        time.sleep(making_seconds)

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        for _ in range(_NAPS):
            time.sleep(self._seconds / _NAPS)
        return super().step(action)


def _register(
    env_id: str,
    single: type | None = None,
    vector: type | None = None,
    *,
    max_episode_steps: int | None = None,
) -> None:
    gymnasium.register(
        env_id,
        max_episode_steps=max_episode_steps,
        entry_point=f"{MODULE}:{single.__name__}" if single else None,
        vector_entry_point=f"{MODULE}:{vector.__name__}" if vector else None,
    )


_register("Trouble-v0", TroubleEnvironment)
_register("Spaces-v0", SpacesEnvironment)
_register("Slow-v0", SlowEnvironment)
_register("Talkative-v0", TalkativeEnvironment)
_register("Layout-v0", LayoutEnvironment)
_register("Odd-v0", OddEnvironment)
_register("OddLimited-v0", OddEnvironment, max_episode_steps=100)  # which Gymnasium's own wrapper looks after
_register("OddVector-v0", None, OddVectorEnvironment)
_register("Bare-v0", CountingEnvironment, BareVectorEnvironment)
_register("NextStep-v0", CountingEnvironment, NextStepVectorEnvironment)
_register("SameStep-v0", CountingEnvironment, SameStepVectorEnvironment)
_register("SameStepOnly-v0", None, SameStepVectorEnvironment)
_register("Choosing-v0", CountingEnvironment, ChoosingVectorEnvironment)
