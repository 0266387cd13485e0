"""Finds an environment by its id and makes vector environments of it; knows nothing of streams.

Three ways: the environment's own vector version (native), one after the other (sync), one process each
(async).
"""

import importlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import gymnasium
from gymnasium import Env
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from services.actor.autoreset import autoreset_mode
from services.actor.pools import MODULE, is_pool, pool_spec
from services.actor.restarting import CRASHES, RestartingEnvironment, in_a_line
from services.actor.spaces import environment_spec
from shared.errors import SeedrlError, UnsupportedEnvironment
from shared.telemetry import get_logger
from shared.working_directory import OWN_PACKAGES, see_working_directory

Vectorization = Literal["native", "sync", "async"]
Vector = VectorEnv[Any, Any, Any]

ALE_NAMESPACE = "ALE/"
_ALE_VECTOR = "ale_py.vector_env:AtariVectorEnv"

log = get_logger(__name__)


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class GroupMaker:
    """Makes groups of `group_size` environments, all alike; asked again when a group has to be rebuilt."""

    env: str  # a Gymnasium id, or module:id
    group_size: int
    vectorization: Literal["auto", "native", "sync", "async"] = "auto"
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    life_loss: bool = False
    env_threads: int = 0  # 0: one per CPU
    on_made: Callable[[], None] = _nothing  # called after each of environments that are made one by one

    def __call__(self) -> Vector:
        """A vector environment with NEXT_STEP autoreset. Raises UnsupportedEnvironment."""
        spec = resolved(self.env)
        way = self._way(spec)
        if self.life_loss and (way != "native" or not _is_ale_vector(spec)):
            raise UnsupportedEnvironment(
                f"life_loss: {self.env} does not tell when a life is lost; only native ALE environments do: "
                "give --no-life-loss"
            )
        try:
            if way != "native":
                return self._of_single_environments(way)
            native = self._native(spec)
            if autoreset_mode(native) is AutoresetMode.NEXT_STEP:
                return native
            return self._instead_of(native)
        except SeedrlError:
            raise
        except CRASHES as error:
            raise UnsupportedEnvironment(
                f"{self.env} could not be made ({way}): {in_a_line(error)}"
            ) from error

    @property
    def seeds_itself(self) -> bool:
        """Whether the environments differ without seeds, which would cost as much as to make them once more.

        Native ALE environments load their game again for a seed, a tenth of a second for each. What differs
        is the number of no-ops they begin with, each drawn from a generator of its own; sticky actions come
        from the emulator's, so those get seeds. Raises UnsupportedEnvironment.
        """
        spec = resolved(self.env)
        is_sticky = self.env_kwargs.get("repeat_action_probability", 0) != 0
        return self._way(spec) == "native" and _is_ale_vector(spec) and not is_sticky

    def _way(self, spec: EnvSpec) -> Vectorization:
        if self.vectorization == "native" and spec.vector_entry_point is None:
            raise UnsupportedEnvironment(
                f"{self.env} has no native vector environment; use auto, sync or async"
            )
        if is_pool(spec) and self.vectorization in ("sync", "async"):
            raise UnsupportedEnvironment(
                f"{self.env}: {MODULE} has native vector environments alone; use auto or native"
            )
        if self.vectorization != "auto":
            return self.vectorization
        return "native" if spec.vector_entry_point is not None and not spec.additional_wrappers else "sync"

    def _native(self, spec: EnvSpec) -> Vector:
        entry_point = spec.vector_entry_point
        assert entry_point is not None
        creator: Any = entry_point if callable(entry_point) else load_env_creator(entry_point)
        kwargs = dict(spec.kwargs)
        if spec.max_episode_steps is not None:
            kwargs["max_episode_steps"] = spec.max_episode_steps
        if "autoreset_mode" in inspect.signature(creator).parameters:
            kwargs["autoreset_mode"] = AutoresetMode.NEXT_STEP
        if _is_ale_vector(spec):
            kwargs |= self._atari_kwargs()
        elif is_pool(spec):
            kwargs["num_threads"] = self._threads
        native: Vector = creator(num_envs=self.group_size, **deepcopy({**kwargs, **self.env_kwargs}))
        environment_spec(native.single_observation_space, native.single_action_space)
        rows = native.action_space.shape
        if native.num_envs != self.group_size or rows != (self.group_size,):
            raise UnsupportedEnvironment(
                f"{self.env} does not step all of its {self.group_size} environments at once; "
                "remove batch_size from its arguments"
            )
        return native

    @property
    def _threads(self) -> int:
        return self.env_threads or min(_usable_cpus(), self.group_size)

    def _atari_kwargs(self) -> dict[str, Any]:
        """Every option: ale-py's defaults clip rewards, stack frames, press FIRE; its ids are sticky."""
        return {
            "num_threads": self._threads,
            "max_num_frames_per_episode": 108_000,
            "repeat_action_probability": 0.0,
            "full_action_space": False,
            "continuous": False,
            "img_height": 84,
            "img_width": 84,
            "grayscale": True,
            "stack_num": 1,
            "frameskip": 4,
            "maxpool": True,
            "noop_max": 30,
            "episodic_life": False,
            "life_loss_info": self.life_loss,
            "reward_clipping": False,
            "use_fire_reset": False,
        }

    def _instead_of(self, native: Vector) -> Vector:
        """Single environments in place of a native vector environment whose autoreset is another one."""
        mode = autoreset_mode(native)
        said = f"autoreset {mode.value}" if mode else "no autoreset mode"
        native.close()
        if self.vectorization == "native" or resolved(self.env).entry_point is None:
            raise UnsupportedEnvironment(
                f"{self.env}: its native vector environment has {said}; NextStep is needed"
            )
        log.warning("native vector environment not used", env=self.env, reason=f"{said}; NextStep is needed")
        return self._of_single_environments("sync")

    def _of_single_environments(self, way: Literal["sync", "async"]) -> Vector:
        make = SingleMaker(env=self.env, env_kwargs=self.env_kwargs)

        def made() -> Env[Any, Any]:
            env = make()
            self.on_made()
            return env

        # Observations are turned into bytes before the next step, so the buffers can be used again.
        if way == "sync":
            makers = [made] * self.group_size
            return SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)
        return AsyncVectorEnv(
            [make] * self.group_size,
            copy=False,
            context=_safe_context(),
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )


@dataclass(frozen=True, kw_only=True)
class SingleMaker:
    """Makes one environment, in this process or in one of its own."""

    env: str
    env_kwargs: dict[str, Any]

    def __call__(self) -> Env[Any, Any]:
        """An environment that survives its own crashes."""
        if (actor := multiprocessing.parent_process()) is not None:
            # Ctrl-C reaches a whole terminal; the actor ends its processes itself.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            threading.Thread(target=_end_with, args=(actor,), name="parent", daemon=True).start()
        resolved(self.env)  # a process of its own has to import the user's module, too
        env = RestartingEnvironment(self._bare)
        environment_spec(env.observation_space, env.action_space)  # clearer than what a vectorizer would say
        return env

    def _bare(self) -> Env[Any, Any]:
        spec = resolved(self.env)
        kwargs = {"repeat_action_probability": 0.0} if _is_ale_vector(spec) else {}
        # Each has its own: an environment may change what it was given, or keep its state in it.
        return gymnasium.make(spec, disable_env_checker=True, **deepcopy({**kwargs, **self.env_kwargs}))


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A worker that hangs in a step does not see that its pipe has ended, nor that its actor was killed."""
    parent.join()
    os._exit(1)


def resolved(env: str) -> EnvSpec:
    """The registered environment called `env`, a Gymnasium id or module:id; of envpool its own.

    Raises UnsupportedEnvironment.
    """
    module, _, env_id = env.rpartition(":")
    if module:
        _import_users(module, env)
        if module == MODULE:
            return pool_spec(env_id)
    elif env_id.startswith(ALE_NAMESPACE) and not _ale_is_registered():
        raise UnsupportedEnvironment(f"{env_id} needs ale-py: pip install 'seedrl[atari]'")
    found = gymnasium.registry.get(env_id)
    # ale-py has names without its namespace, too, such as PongNoFrameskip-v4.
    if found is None and not module and _ale_is_registered():
        found = gymnasium.registry.get(env_id)
    if found is None:
        raise UnsupportedEnvironment(f"unknown environment {env_id!r}{_suggestions(env_id)}")
    return found


def check_env(env: str) -> None:
    """Raises UnsupportedEnvironment where `env` cannot be; a person's module is looked for, not imported."""
    module = env.rpartition(":")[0].partition(".")[0]
    if not module:
        resolved(env)
        return
    see_working_directory()
    if importlib.util.find_spec(module) is None:
        raise UnsupportedEnvironment(
            f"{env}: there is no module {module!r} in the working directory, nor is one installed"
        )


def _import_users(module: str, env: str) -> None:
    see_working_directory()
    try:
        importlib.import_module(module)
    except CRASHES as error:
        clash = (
            " (that name is taken by seedrl's own package)"
            if module.partition(".")[0] in OWN_PACKAGES
            else ""
        )
        raise UnsupportedEnvironment(f"{env}: cannot import {module!r}{clash}: {in_a_line(error)}") from error


def _ale_is_registered() -> bool:
    """Registers ale-py's environments; False when it is not installed."""
    try:
        ale_py = importlib.import_module("ale_py")
    except ModuleNotFoundError:
        return False
    if not any(env_id.startswith(ALE_NAMESPACE) for env_id in gymnasium.registry):
        gymnasium.register_envs(ale_py)
    return True


def _is_ale_vector(spec: EnvSpec) -> bool:
    return spec.vector_entry_point == _ALE_VECTOR


def _suggestions(env_id: str) -> str:
    """Ids of nearly this name: of each the newest in the same namespace, and the newest at all."""
    by_name: dict[str, list[str]] = {}
    for each in gymnasium.registry:
        by_name.setdefault(_bare_name(each), []).insert(0, each)  # newer versions are registered later
    close: dict[str, None] = {}
    for name in get_close_matches(_bare_name(env_id), by_name, n=2):
        near = [each for each in by_name[name] if _namespace(each) == _namespace(env_id)]
        close |= dict.fromkeys([*near[:1], by_name[name][0]])
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _namespace(env_id: str) -> str:
    return env_id.rpartition("/")[0]


def _bare_name(env_id: str) -> str:
    return re.sub(r"-v\d+$", "", env_id.rpartition("/")[2]).lower()


def _safe_context() -> str:
    """How processes are started: never by forking this one, whose gRPC threads would not survive that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", __name__])
    return "forkserver"


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
