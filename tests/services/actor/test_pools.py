"""Environments of envpool, where that is installed."""

from typing import Any

import numpy as np
import pytest

from services.actor.environments import GroupMaker
from services.actor.pools import Pool
from services.actor.stepping import SteppedGroup
from shared.errors import UnsupportedEnvironment

pytest.importorskip("envpool")
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered")

B = 4


def pool(env: str, **settings: Any) -> Any:
    return GroupMaker(env=f"envpool:{env}", group_size=B, env_threads=1, **settings)()


def test_episodes_start_where_the_pool_has_reset() -> None:
    elapsed: list[np.ndarray] = []

    def recording() -> Any:
        env = pool("CartPole-v1")
        step = env.step

        def recorded(action: Any) -> Any:
            result = step(action)
            elapsed.append(result[-1]["elapsed_step"].copy())
            return result

        env.step = recorded
        return env

    group = SteppedGroup(recording, seeds=np.random.SeedSequence(1))
    group.reset()
    random = np.random.default_rng(1)
    steps = [group.step(random.integers(2, size=B)) for _ in range(300)]
    is_first = np.array([np.frombuffer(each.is_first, np.bool_) for each in steps])
    assert is_first.sum() > 20
    np.testing.assert_array_equal(is_first, np.array(elapsed) == 0)
    observations = np.array([np.frombuffer(each.observation[0], "<f4").reshape(B, 4) for each in steps])
    assert (np.abs(observations[is_first]) <= 0.05).all()
    rewards = np.array([np.frombuffer(each.reward, "<f4") for each in steps])
    np.testing.assert_array_equal(rewards, np.where(is_first, 0.0, 1.0))


def test_the_seed_decides_and_later_resets_go_on() -> None:
    env = pool("CartPole-v1")
    first, second, again = (env.reset(seed=seed)[0].copy() for seed in (3, 4, 3))
    np.testing.assert_array_equal(first, again)
    assert (first != second).all()
    assert len(np.unique(first[:, 0])) == B
    assert (env.reset()[0] != first).all()


def test_frames_come_single_unless_they_are_wanted_stacked() -> None:
    assert pool("Pong-v5").single_observation_space.shape == (1, 84, 84)
    assert pool("Pong-v5", env_kwargs={"stack_num": 2}).single_observation_space.shape == (2, 84, 84)


def test_observations_of_several_parts_fit_their_space() -> None:
    group = SteppedGroup(lambda: pool("MiniGrid-Empty-5x5-v0"), seeds=np.random.SeedSequence(1))
    assert {leaf.name for leaf in group.spec.observation} == {"direction", "image", "mission"}
    group.reset()
    assert group.step(np.full(B, 2)).steps == B


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        ("Pongg-v5", {}, "unknown environment 'envpool:Pongg-v5'; did you mean envpool:Pong-v5"),
        ("CartPole-v1", {"env_kwargs": {"batch_size": 2}}, "batch_size is no argument here"),
        ("CartPole-v1", {"env_kwargs": {"seed": 2}}, "give --seed"),
        ("CartPole-v1", {"env_kwargs": {"nonsense": 2}}, "nonsense"),
        ("CartPole-v1", {"vectorization": "sync"}, "envpool has native vector environments alone"),
        ("Pong-v5", {"life_loss": True}, "--no-life-loss"),
        ("Pendulum-v1", {}, "only Discrete is"),
    ],
)
def test_what_is_no_pool_is_named(env: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=words):
        pool(env, **settings)


def test_a_pool_can_be_closed_before_and_after_it_was_used() -> None:
    for is_used in (False, True):
        env = Pool("CartPole-v1", num_envs=B, num_threads=1)
        if is_used:
            env.reset(seed=1)
            env.step(np.zeros(B, np.int64))
        env.close()
