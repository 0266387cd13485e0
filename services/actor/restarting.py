"""A crashed environment is replaced by a new one; one that crashes again and again ends the actor.

One that gives a number that is not finite, or results that are not as they should be, counts as crashed.
"""

import traceback
from asyncio import CancelledError
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import Env

from services.actor.finite import check_reward
from services.actor.results import WrongResult, explained, first_and_info, one_reward, wrong_count
from services.actor.spaces import ObservationCheck
from shared.errors import ConfigurationError, SeedrlError
from shared.telemetry import get_logger

MAX_CRASHES_IN_A_ROW = 10

# In an environment's info: how many environments were used up, what their crashes said, and the last one in a
# line. As info, since the environment may live in a process of its own, whose log nobody reads.
RESTARTS = "seedrl_restarts"
CRASH = "seedrl_crash"
REASON = "seedrl_reason"

# What a crash is: some libraries end the process when a window or a simulator is gone, and in an environment
# with an event loop of its own something may be cancelled.
CRASHES = (Exception, SystemExit, CancelledError)


log = get_logger(__name__)


class EnvironmentCrashed(SeedrlError):
    """An environment that crashes whenever it is replaced."""


class EnvironmentMistaken(EnvironmentCrashed):
    """One that never took a step, and returned each time what its own space or Gymnasium does not allow.

    To start it again changes nothing.
    """

    exit_status = ConfigurationError.exit_status


class EnvironmentHangs(SeedrlError):
    """An environment that does not come back from a step."""


class CrashCount:
    """Crashes since the last successful step."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._is_mistaken = True  # so far

    def crashed(self, error: BaseException) -> None:
        """Raises EnvironmentCrashed when it was one too many."""
        self._in_a_row += 1
        self._is_mistaken = self._is_mistaken and isinstance(error, WrongResult)
        if self._in_a_row >= MAX_CRASHES_IN_A_ROW:
            kind = EnvironmentMistaken if self._is_mistaken else EnvironmentCrashed
            raise kind(f"crashed {self._in_a_row} times in a row, at last with {in_a_line(error)}") from error

    def stepped(self) -> None:
        """A step succeeded."""
        self._in_a_row = 0
        self._is_mistaken = False


class RestartingEnvironment(Env[Any, Any]):
    """One environment that survives its own crashes.

    A step or reset that raises, or gives a number that is not finite or a wrong result, returns the first
    observation of a new environment instead, with reward 0 and neither end flag; info then holds RESTARTS,
    CRASH and REASON. The environment's own info goes no further: nobody reads it, and Gymnasium cannot batch
    every one.
    Raises EnvironmentCrashed.
    """

    def __init__(self, make: Callable[[], Env[Any, Any]]) -> None:
        self._make = make
        self._env = make()
        self._check = ObservationCheck(self._env.observation_space)
        self._crashes = CrashCount()
        self._seeds: np.random.SeedSequence | None = None
        self.observation_space = self._env.observation_space
        self.action_space = self._env.action_space
        self.metadata = self._env.metadata
        self.render_mode = self._env.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """First observation of an episode."""
        if seed is not None:
            self._seeds = np.random.SeedSequence(seed)
        try:
            observation, _ = first_and_info(self._env.reset(seed=seed, options=options))
            self._check(observation)
            return observation, {}
        except CRASHES as error:
            return self._replaced(error)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        try:
            result = self._env.step(action)
            try:
                observation, given, terminated, truncated, _ = result
            except (TypeError, ValueError) as error:
                raise wrong_count("step", result) from error
            reward, terminated, truncated = one_reward(given), bool(terminated), bool(truncated)
            check_reward(reward)
            self._check(observation)
        except CRASHES as error:
            observation, info = self._replaced(error)
            return observation, 0.0, False, False, info
        self._crashes.stepped()
        return observation, reward, terminated, truncated, {}

    def close(self) -> None:
        """Closes the environment. What that raises keeps no other from being closed."""
        try:
            self._env.close()
        except CRASHES as error:
            log.debug("closing an environment failed", reason=in_a_line(error))

    def _replaced(self, error: BaseException) -> tuple[Any, dict[str, Any]]:
        """First observation of a new environment, made and reset until that succeeds."""
        restarts = 0
        said = []
        while True:
            error = explained(error)
            said.append("".join(traceback.format_exception(error)))
            self._crashes.crashed(error)
            restarts += 1
            try:
                self._env.close()
            except CRASHES as closing:  # it is broken anyway
                said.append(f"its close() raised {in_a_line(closing)}\n")
            try:
                self._env = self._make()
                observation, _ = first_and_info(self._env.reset(seed=self._fresh_seed()))
                self._check(observation)
            except CRASHES as again:
                error = again
                continue
            return observation, {RESTARTS: restarts, CRASH: "".join(said), REASON: in_a_line(error)}

    def _fresh_seed(self) -> int | None:
        return None if self._seeds is None else seed_from(self._seeds)


def seed_from(seeds: np.random.SeedSequence) -> int:
    """The next seed of a sequence; small enough to add the environment's number within its group."""
    return int(seeds.spawn(1)[0].generate_state(1)[0]) & 0x3FFF_FFFF


def in_a_line(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or "no text").splitlines()[0]
