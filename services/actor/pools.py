"""Environments of envpool, as `envpool:Pong-v5`: its pools of threads as Gymnasium's vector environments."""

import functools
import importlib
import secrets
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from shared.errors import UnsupportedEnvironment

MODULE = "envpool"
_SEEDS = 2**30
_OURS = {
    "batch_size": "all environments of a group step at once",
    "num_envs": "give --group-size",
    "num_threads": "give --env-threads",
    "seed": "give --seed",
}


def pool_spec(env_id: str) -> EnvSpec:
    """What envpool calls `env_id`. Raises UnsupportedEnvironment when it has none of that name."""
    ids = importlib.import_module(MODULE).list_all_envs()
    if env_id not in ids:
        close = get_close_matches(env_id, ids, n=2)
        suggestions = f"; did you mean {' or '.join(f'{MODULE}:{each}' for each in close)}?" if close else ""
        raise UnsupportedEnvironment(f"unknown environment {f'{MODULE}:{env_id}'!r}{suggestions}")
    return EnvSpec(env_id, vector_entry_point=functools.partial(Pool, env_id))


def is_pool(spec: EnvSpec) -> bool:
    """Whether `spec` is one of `pool_spec`."""
    return getattr(spec.vector_entry_point, "func", None) is Pool


class Pool(VectorEnv[Any, Any, Any]):
    """`num_envs` environments of envpool in `num_threads` threads.

    What envpool takes a seed for is made at the first reset, and made anew by later ones with a seed.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # type: ignore[misc]

    def __init__(self, env_id: str, *, num_envs: int, num_threads: int, **kwargs: Any) -> None:
        """`kwargs`: envpool's own. Frames come unstacked unless they say `stack_num`.

        Raises UnsupportedEnvironment for what is not envpool's to decide, and for several players.
        """
        for name in kwargs.keys() & _OURS.keys():
            raise UnsupportedEnvironment(f"{MODULE}:{env_id}: {name} is no argument here: {_OURS[name]}")
        envpool = importlib.import_module(MODULE)
        known = envpool.make_spec(env_id).config._fields
        if "stack_num" in known:
            kwargs = {"stack_num": 1, **kwargs}
        spec = envpool.make_spec(env_id, **kwargs)
        if getattr(spec.config, "max_num_players", 1) > 1:
            raise UnsupportedEnvironment(f"{MODULE}:{env_id} has several players; one is supported")
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spec.observation_space, spec.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        sizes = {"num_envs": num_envs, "batch_size": num_envs, "num_threads": num_threads}
        self._made = functools.partial(envpool.make_gymnasium, env_id, **sizes, **kwargs)
        self._pool: Any = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """First observations of all environments; they are seeded with `seed`, `seed` + 1 and so on."""
        del options  # envpool takes none
        if self._pool is None or seed is not None:
            self._pool = self._made(seed=secrets.randbelow(_SEEDS) if seed is None else seed)
        observation, info = self._pool.reset()
        return observation, info

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Takes an action [B] in every environment; one whose episode has ended begins the next instead."""
        observation, reward, terminated, truncated, info = self._pool.step(np.asarray(actions, np.int32))
        return observation, reward, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Lets go of the pool, whose threads end with it."""
        del kwargs
        self._pool = None
