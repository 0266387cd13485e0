import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from services.actor import environments
from services.actor.autoreset import autoreset_mode
from services.actor.environments import GroupMaker, check_env, resolved
from shared.errors import UnsupportedEnvironment
from tests.support import actor_environments as trouble

OURS = "tests.support.actor_environments"
COUNTING = "tests.support.counting_environment"


def test_an_environment_with_a_native_version_is_stepped_natively() -> None:
    assert type(GroupMaker(env="CartPole-v1", group_size=3)()).__name__ == "CartPoleVectorEnv"
    assert type(GroupMaker(env="ALE/Pong-v5", group_size=1)()).__name__ == "AtariVectorEnv"


def test_an_environment_without_one_is_stepped_one_after_the_other() -> None:
    env = GroupMaker(env="MountainCar-v0", group_size=3)()
    assert isinstance(env, SyncVectorEnv)
    assert env.num_envs == 3


def test_the_way_can_be_chosen() -> None:
    assert isinstance(GroupMaker(env="CartPole-v1", group_size=2, vectorization="sync")(), SyncVectorEnv)
    env = GroupMaker(env="CartPole-v1", group_size=2, vectorization="async")()
    try:
        assert isinstance(env, AsyncVectorEnv)
    finally:
        env.close()


def test_native_is_refused_where_there_is_none() -> None:
    with pytest.raises(UnsupportedEnvironment, match="MountainCar-v0 has no native vector environment"):
        GroupMaker(env="MountainCar-v0", group_size=2, vectorization="native")()


def test_processes_are_never_forked_from_this_one() -> None:
    assert environments._safe_context() in ("forkserver", "spawn")


def test_environments_keep_their_time_limit_in_every_way() -> None:
    for way in ("native", "sync"):
        env = GroupMaker(env="CartPole-v0", group_size=1, vectorization=way)()  # type: ignore[arg-type]
        env.reset(seed=1)
        truncated = [_balanced(env) for _ in range(200)]
        assert truncated == [False] * 199 + [True], way
        env.close()


def _balanced(env: Any) -> bool:
    """One step with the pole put back upright."""
    inner = env if hasattr(env, "state") else env.envs[0]._env.unwrapped
    inner.state = np.zeros((4, 1)) if inner is env else np.zeros(4)
    return bool(env.step(np.array([0]))[3][0])


def test_arguments_reach_the_environment_in_every_way() -> None:
    for way in ("native", "sync"):
        kwargs = {"env_kwargs": {"sutton_barto_reward": True}, "vectorization": way}
        env = GroupMaker(env="CartPole-v1", group_size=1, **kwargs)()  # type: ignore[arg-type]
        env.reset(seed=1)
        assert env.step(np.array([0]))[1][0] == 0.0, way


def test_each_environment_has_arguments_of_its_own() -> None:
    given = {"layout": [0, 0]}
    env = GroupMaker(env=f"{OURS}:Layout-v0", group_size=3, env_kwargs=given)()
    env.reset()
    assert env.step(np.zeros(3, np.int64))[0].tolist() == [[1, 0]] * 3
    assert given == {"layout": [0, 0]}


def test_a_native_environment_that_takes_its_autoreset_mode_gets_next_step() -> None:
    env = GroupMaker(env=f"{OURS}:Choosing-v0", group_size=2)()
    assert isinstance(env, trouble.ChoosingVectorEnvironment)
    assert autoreset_mode(env) is AutoresetMode.NEXT_STEP


def test_a_native_environment_with_next_step_in_its_metadata_is_taken() -> None:
    env = GroupMaker(env=f"{OURS}:NextStep-v0", group_size=2)()
    assert isinstance(env, trouble.NextStepVectorEnvironment)


@pytest.mark.parametrize(
    ("env_id", "words"), [("SameStep-v0", "autoreset SameStep"), ("Bare-v0", "no autoreset mode")]
)
def test_another_autoreset_falls_back_to_single_environments_unless_native_was_demanded(
    env_id: str, words: str
) -> None:
    env = GroupMaker(env=f"{OURS}:{env_id}", group_size=2)()
    assert isinstance(env, SyncVectorEnv)
    assert env.autoreset_mode is AutoresetMode.NEXT_STEP
    with pytest.raises(UnsupportedEnvironment, match=f"{words}; NextStep is needed"):
        GroupMaker(env=f"{OURS}:{env_id}", group_size=2, vectorization="native")()


def test_another_autoreset_without_a_single_environment_is_refused() -> None:
    with pytest.raises(UnsupportedEnvironment, match="autoreset SameStep; NextStep is needed"):
        GroupMaker(env=f"{OURS}:SameStepOnly-v0", group_size=2)()


def test_an_environment_with_wrappers_of_its_own_is_not_stepped_natively() -> None:
    spec = gymnasium.spec("CartPole-v1")
    wrapper = gymnasium.wrappers.FlattenObservation.wrapper_spec()
    gymnasium.register(
        "WrappedCartPole-v0",
        entry_point=spec.entry_point,
        vector_entry_point=spec.vector_entry_point,
        additional_wrappers=(wrapper,),
    )
    try:
        assert isinstance(GroupMaker(env="WrappedCartPole-v0", group_size=1)(), SyncVectorEnv)
    finally:
        del gymnasium.registry["WrappedCartPole-v0"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("CartPole-v7", "unknown environment 'CartPole-v7'; did you mean CartPole-v1"),
        ("cartpole", "did you mean CartPole-v1"),
        ("ALE/Pomg-v5", "unknown environment 'ALE/Pomg-v5'; did you mean ALE/Pong-v5"),
        ("Pong-v5", "did you mean .*ALE/Pong-v5"),
        ("xyzzy", "unknown environment 'xyzzy'$"),
        (f"{COUNTING}:Countin-v0", "unknown environment 'Countin-v0'; did you mean Counting-v0"),
        (
            "no_such_module:Env-v0",
            "no_such_module:Env-v0: cannot import 'no_such_module': ModuleNotFoundError",
        ),
        (
            "shared.my_envs:Env-v0",
            r"cannot import 'shared.my_envs' \(that name is taken by seedrl's own package\)",
        ),
    ],
)
def test_an_environment_that_is_not_there_is_one_line_that_helps(env: str, words: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=words) as caught:
        resolved(env)
    assert "\n" not in str(caught.value)


def test_ale_py_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(
        UnsupportedEnvironment, match=r"ALE/Pong-v5 needs ale-py: pip install 'seedrl\[atari\]'"
    ):
        resolved("ALE/Pong-v5")


def test_a_module_is_found_in_the_working_directory_but_shadows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_envs.py").write_text(
        "from gymnasium import register\n"
        "register('Mine-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    try:
        assert resolved("my_own_envs:Mine-v0").id == "Mine-v0"
        assert sys.path[-1] == str(tmp_path)
    finally:
        gymnasium.registry.pop("Mine-v0", None)
        sys.modules.pop("my_own_envs", None)


def test_a_module_that_raises_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_envs.py").write_text("raise RuntimeError('no licence\\nmore lines')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UnsupportedEnvironment, match=r"cannot import 'broken_envs': RuntimeError: no licence$"
    ):
        resolved("broken_envs:Mine-v0")
    check_env("broken_envs:Mine-v0")  # without importing it


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("cartpole", "did you mean CartPole-v1"),
        ("no_such_module.envs:Env-v0", "no module 'no_such_module' in the working directory, nor"),
    ],
)
def test_a_mistaken_name_is_known_before_anything_is_imported(env: str, words: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=words):
        check_env(env)


@pytest.mark.parametrize("way", ["native", "sync", "async"])
def test_bad_arguments_are_one_line(way: Any) -> None:
    with pytest.raises(
        UnsupportedEnvironment, match=rf"CartPole-v1 could not be made \({way}\): TypeError.*nonsense"
    ):
        GroupMaker(env="CartPole-v1", group_size=2, vectorization=way, env_kwargs={"nonsense": 1})()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_unsupported_spaces_are_named_before_a_vectorizer_stumbles(way: Any) -> None:
    with pytest.raises(UnsupportedEnvironment, match="'observation': space Text"):
        GroupMaker(env=f"{OURS}:Spaces-v0", group_size=2, vectorization=way)()


def test_a_nested_space_goes_through_both_kinds_of_single_environments() -> None:
    space = spaces.Dict({"a": spaces.Discrete(3, start=5), "b": spaces.Tuple([spaces.Box(0, 1, (2,))])})
    for way in ("sync", "async"):
        env = GroupMaker(
            env=f"{OURS}:Spaces-v0", group_size=2, vectorization=way, env_kwargs={"observation_space": space}
        )()  # type: ignore[arg-type]
        observation, _ = env.reset(seed=1)
        assert observation["a"].shape == (2,)
        assert observation["b"][0].shape == (2, 2)
        env.close()


@pytest.mark.parametrize("env", ["CartPole-v1", f"{COUNTING}:CountingVector-v0"])
def test_life_loss_is_refused_where_lives_are_unknown(env: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=f"life_loss: {env} does not tell when a life is lost"):
        GroupMaker(env=env, group_size=2, life_loss=True)()
    with pytest.raises(UnsupportedEnvironment, match="life_loss: ALE/Pong-v5"):
        GroupMaker(env="ALE/Pong-v5", group_size=2, life_loss=True, vectorization="sync")()
