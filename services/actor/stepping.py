"""One group of environments: steps it, tells what each step was, survives its crashes; knows no stream."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from services.actor.autoreset import EpisodeStarts, episode_starts
from services.actor.finite import check_finite
from services.actor.restarting import CRASH, CRASHES, REASON, RESTARTS, CrashCount, in_a_line, seed_from
from services.actor.results import WrongResult, explained, first_and_info, wrong_count
from services.actor.spaces import ActionDecoder, ObservationEncoder, environment_spec
from services.actor.sparing import SparingLog
from shared.errors import SeedrlError, UnsupportedEnvironment
from shared.telemetry import get_logger
from shared.types import Array

Flags = NDArray[np.bool_]

_CLOSE_SECONDS = 0.5  # for environments in processes of their own; an actor has to be gone within 2 s

log = get_logger(__name__)


class Transition(NamedTuple):
    """What one step or reset of B environments led to, ready for the wire."""

    observation: list[bytes]  # per leaf [B, …], little-endian; none where they lie in shared memory
    reward: bytes  # [B] float32, 0 where is_first
    terminated: bytes  # [B] uint8, 0 where is_first
    truncated: bytes  # [B] uint8, 0 where is_first
    is_first: bytes  # [B] uint8
    steps: int  # rows whose action was taken
    reset_steps: int  # rows whose action was ignored
    episodes: int  # rows whose episode had come to its end and began anew
    restarts: int  # crashed environments that were replaced


class SteppedGroup:
    """A vector environment between its spaces and the wire.

    All methods block. They exclude each other: an actor that is stopped closes its groups while one may step.
    """

    def __init__(
        self, make: Callable[[], VectorEnv[Any, Any, Any]], *, seeds: np.random.SeedSequence | None
    ) -> None:
        """Makes the environments; without `seeds` they seed themselves. Raises UnsupportedEnvironment."""
        self._lock = threading.Lock()
        self._make = make
        self._seeds = seeds
        self._crashes = CrashCount()
        self._crash_log = SparingLog(log)
        self.last_crash = ""  # of any of its environments, in a line
        self._env, self._seed = self._made()
        spaces = self._env.single_observation_space, self._env.single_action_space
        self.spec = environment_spec(*spaces)
        self.size = self._env.num_envs
        self._encode = ObservationEncoder(spaces[0], group_size=self.size)
        self._decode = ActionDecoder(spaces[1])
        self._starts: EpisodeStarts | None = None  # before the first reset
        self._into: Sequence[Array] | None = None

    def reset(self, *, into: Sequence[Array] | None = None) -> Transition:
        """First observations of new episodes in all rows.

        `into`: arrays, per leaf [B, …], in which these and all later observations are left, until a reset
        says otherwise; transitions come without them then.
        """
        with self._lock:
            self._into = into
            try:
                return self._all_first()
            except SeedrlError:
                raise
            except CRASHES as error:
                return self._rebuilt(explained(error))

    def step(self, action: NDArray[np.int64]) -> Transition:
        """Takes 0-based actions [B]. A crash of the whole group starts new episodes in all rows.

        A value that is not finite is such a crash.
        Raises EnvironmentCrashed when crash follows crash.
        """
        with self._lock:
            try:
                result = self._env.step(self._decode(action))
                transition = self._transition(result)
            except SeedrlError:
                raise
            except CRASHES as error:
                return self._rebuilt(explained(error))
            self._crashes.stepped()
            return transition

    def close(self) -> None:
        """Closes the environments; their processes are gone on return."""
        with self._lock:
            closed(self._env)

    def _made(self) -> tuple[VectorEnv[Any, Any, Any], int | None]:
        return self._make(), None if self._seeds is None else seed_from(self._seeds)

    def _all_first(self) -> Transition:
        seed, self._seed = self._seed, None  # only the first reset: later ones go on with the same generators
        observation, info = first_and_info(self._env.reset(seed=seed))
        self._starts = episode_starts(self._env, info)
        zeros, ones = np.zeros(self.size, np.bool_), np.ones(self.size, np.bool_)
        return Transition(
            observation=self._encode(observation, into=self._into),
            reward=np.zeros(self.size, "<f4").tobytes(),
            terminated=zeros.tobytes(),
            truncated=zeros.tobytes(),
            is_first=ones.tobytes(),
            steps=0,
            reset_steps=0,
            episodes=0,
            restarts=self._restarted(info)[1],
        )

    def _transition(self, result: Any) -> Transition:
        try:
            observation, reward, terminated, truncated, info = result
        except (TypeError, ValueError) as error:
            raise wrong_count("step", result) from error
        terminated, truncated = np.array(terminated, np.bool_), np.array(truncated, np.bool_)
        for name, values in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
            if (shape := np.shape(values)) != (self.size,):
                raise WrongResult(f"{name} has shape {list(shape)}; a group of {self.size} has [{self.size}]")
        assert self._starts is not None
        is_first = self._starts.after(info, terminated=terminated, truncated=truncated)
        ended = int(is_first.sum())
        restarts = 0
        if RESTARTS in info:
            restarted, restarts = self._restarted(info)
            is_first = is_first | restarted
        resets = int(is_first.sum())
        if resets:
            terminated[is_first] = truncated[is_first] = False
            reward = np.where(is_first, 0.0, reward)
        reward = np.asarray(reward, "<f4")
        check_finite("reward", reward)
        return Transition(
            observation=self._encode(observation, into=self._into),
            reward=reward.tobytes(),
            terminated=terminated.tobytes(),
            truncated=truncated.tobytes(),
            is_first=is_first.tobytes(),
            steps=self.size - resets,
            reset_steps=resets,
            episodes=ended,
            restarts=restarts,
        )

    def _restarted(self, info: dict[str, Any]) -> tuple[Flags, int]:
        """Rows whose environment is a new one, and how many were used up; logs why."""
        if RESTARTS not in info:
            return np.zeros(self.size, np.bool_), 0
        restarts = np.asarray(info[RESTARTS])
        for row in np.flatnonzero(restarts):
            self.last_crash = str(info[REASON][row])
            crash = str(info[CRASH][row])
            self._crash_log.error("environment crashed and was replaced", row=int(row), crash=crash)
        return restarts > 0, int(restarts.sum())

    def _rebuilt(self, error: BaseException) -> Transition:
        """First observations of a whole new group, made and reset until that succeeds."""
        restarts = 0
        while True:
            self.last_crash = in_a_line(error)
            self._crash_log.error(
                "group of environments crashed and is rebuilt", size=self.size, exc_info=error
            )
            self._crashes.crashed(error)
            restarts += self.size
            is_made = False
            try:
                closed(self._env)
                self._env, self._seed = self._made()
                is_made = True
                first = self._all_first()
            except UnsupportedEnvironment as again:  # it could be made before: a crash like any other
                error = again
            except SeedrlError:
                raise
            except CRASHES as again:
                error = explained(again) if is_made else again
            else:
                return first._replace(reset_steps=self.size, restarts=restarts + first.restarts)


def closed(env: VectorEnv[Any, Any, Any]) -> None:
    """Closes `env`; one that cannot close in time or at all loses its processes."""
    if not isinstance(env, AsyncVectorEnv):
        _close(env)
        return
    # A worker that hangs or is dead would keep close() waiting, until its pipe breaks because it was killed.
    closing = threading.Thread(target=_close, args=(env,), name="closing environments", daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)
    for process in env.processes:
        process.kill()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for process in env.processes:
        process.join(max(0.0, deadline - time.monotonic()))
    closing.join(_CLOSE_SECONDS)
    env.closed = True


def _close(env: VectorEnv[Any, Any, Any]) -> None:
    try:
        env.close()
    except CRASHES as error:
        log.debug("closing environments failed", reason=in_a_line(error))
