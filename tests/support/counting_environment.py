"""Environments whose every number is known, so that a misaligned time step shows as a wrong number.

Importing this module registers, for use as `tests.support.counting_environment:Counting-v0`:

* `Counting-v0` (`CountingEnvironment`): observes which instance, episode and step this is.
* `CountingVector-v0` (`CountingVectorEnvironment`, native only): the same as a vector environment that can
  also report a termination without a reset, as a lost life is.
* `Corridor-v0` (`CorridorEnvironment`): a memory task; see there for chance level and best return.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

NUM_ACTIONS = 16

_unseeded = itertools.count(501)


class Crash(RuntimeError):
    """What a counting environment raises where it was told to."""


def reward_of(observation: Sequence[float] | NDArray[Any], action: int) -> float:
    """What follows `action` upon `observation`; exact in float32.

    1000·(instance mod 10) + 100·(episode mod 10) + step + action/16.
    """
    instance, episode, step = (int(value) for value in observation)
    return 1000.0 * (instance % 10) + 100.0 * (episode % 10) + step + action / 16


def episode_length(lengths: Sequence[int], episode: int) -> int:
    """Steps of `episode` (1, 2 …), as the pattern `lengths` says."""
    return lengths[(episode - 1) % len(lengths)]


class CountingEnvironment(gymnasium.Env[NDArray[Any], np.int64]):
    """Observes (instance, episode, step), all counted from 1, so that 0 is a frame from before the episode.

    The instance is 1 + seed mod 500 when the first reset gives a seed, else a number from 501 up, fresh in
    this process. The reward is `reward_of` the observation that the action answers. An episode of length n
    has n steps (actions), hence n + 1 observations, of which the last has step n + 1.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int] = (5, 3, 1, 8),  # steps of the 1st, 2nd … episode, over and over
        truncate: bool = False,  # episodes are truncated instead of terminated
        dtype: str = "float32",  # or int64
        num_actions: int = NUM_ACTIONS,
        crash_at: int = 0,  # raises Crash instead of this step of the instance's life (1, 2 …); 0: never
    ) -> None:
        self.observation_space = spaces.Box(0, 2**20, (3,), np.dtype(dtype).type)
        self.action_space = spaces.Discrete(num_actions)
        self._lengths, self._truncate, self._crash_at = tuple(lengths), truncate, crash_at
        self._instance = self._episode = self._step = self._life = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        if not self._instance:
            self._instance = next(_unseeded) if seed is None else 1 + seed % 500
        self._episode += 1
        self._step = 1
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        self._life += 1
        if self._life == self._crash_at:
            raise Crash(f"the counting environment was told to crash at step {self._crash_at}")
        if not self.action_space.contains(np.int64(action)):
            raise ValueError(f"no action {action}")
        length = episode_length(self._lengths, self._episode)
        if not 1 <= self._step <= length:
            raise ValueError("stepped after the episode's end")
        reward = reward_of(self._observation(), int(action))
        self._step += 1
        done = self._step > length
        return self._observation(), reward, done and not self._truncate, done and self._truncate, {}

    def _observation(self) -> NDArray[Any]:
        return np.array([self._instance, self._episode, self._step], self.observation_space.dtype)


class CountingVectorEnvironment(VectorEnv[NDArray[Any], NDArray[np.int64], NDArray[Any]]):
    """Counting environments in lockstep with NEXT_STEP autoreset.

    With `life_every` = n, every n-th step of an episode reports `terminated` although the episode goes on.
    What is a real reset says the info, in the same way as ale-py's: `frame_number` − `episode_frame_number`,
    the frames of earlier episodes, grows then (and only then); `is_first` [B] says it plainly.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - gymnasium's attribute

    def __init__(self, num_envs: int = 1, *, life_every: int = 0, **kwargs: Any) -> None:
        self.num_envs = num_envs
        self._environments = [CountingEnvironment(**kwargs) for _ in range(num_envs)]
        self.single_observation_space = self._environments[0].observation_space
        self.single_action_space = self._environments[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._life_every = life_every
        self._ended = np.zeros(num_envs, np.bool_)
        self._frames = np.zeros((2, num_envs), np.int32)  # in all, and of this episode

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        seeds = (
            [None if seed is None else seed + row for row in range(self.num_envs)]
            if seed is None or isinstance(seed, int)
            else seed
        )
        rows = zip(self._environments, seeds, strict=True)
        observations = np.stack([environment.reset(seed=each)[0] for environment, each in rows])
        self._ended[:] = False
        self._frames[0] += 1
        self._frames[1] = 0
        return observations, self._info(np.ones(self.num_envs, np.bool_))

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        is_first = self._ended.copy()
        results = [self._row(row, actions[row], reset=bool(is_first[row])) for row in range(self.num_envs)]
        observations, rewards, terminated, truncated = (
            np.stack(values) for values in zip(*results, strict=True)
        )
        self._ended = terminated | truncated
        self._frames[0] += 1
        self._frames[1] = np.where(is_first, 0, self._frames[1] + 1)
        if self._life_every:
            life_lost = ~is_first & (self._frames[1] % self._life_every == 0)
            terminated = terminated | (life_lost & ~truncated)
        return observations, rewards.astype(np.float64), terminated, truncated, self._info(is_first)

    def _row(self, row: int, action: np.int64, *, reset: bool) -> tuple[NDArray[Any], float, bool, bool]:
        if reset:
            return self._environments[row].reset()[0], 0.0, False, False
        return self._environments[row].step(action)[:4]

    def _info(self, is_first: NDArray[np.bool_]) -> dict[str, Any]:
        total, episode = self._frames.copy()
        return {"frame_number": total, "episode_frame_number": episode, "is_first": is_first}


class CorridorEnvironment(gymnasium.Env[NDArray[np.float32], np.int64]):
    """A cue is shown at the entrance only; at the end, `length` steps later, the action must equal it.

    Observation [cues + 1]: the cue one-hot in the first step, zeros after it; the last element is 1 where the
    answer counts. The answer's reward is 1 when right, else 0; all other rewards are 0. An episode has
    `length` + 1 actions and the last one counts. Best mean return: 1. Without memory: 1/cues.
    """

    def __init__(self, *, length: int = 10, cues: int = 2) -> None:
        if length < 1:
            raise ValueError("a corridor has at least one step")
        self.observation_space = spaces.Box(0, 1, (cues + 1,), np.float32)
        self.action_space = spaces.Discrete(cues)
        self._length, self._cues = length, cues
        self._cue = self._position = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._cue, self._position = int(self.np_random.integers(self._cues)), 0
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        at_end = self._position == self._length
        reward = float(at_end and int(action) == self._cue)
        self._position += 1
        return self._observation(), reward, at_end, False, {}

    def _observation(self) -> NDArray[np.float32]:
        observation = np.zeros(self._cues + 1, np.float32)
        if self._position == 0:
            observation[self._cue] = 1
        observation[self._cues] = self._position == self._length
        return observation


gymnasium.register("Counting-v0", entry_point=f"{__name__}:CountingEnvironment")
gymnasium.register("CountingVector-v0", vector_entry_point=f"{__name__}:CountingVectorEnvironment")
gymnasium.register("Corridor-v0", entry_point=f"{__name__}:CorridorEnvironment")
