"""What ale-py's vector environment really does, and what the actor makes of it, in real games."""

from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from services.actor.environments import GroupMaker
from services.actor.stepping import SteppedGroup
from shared.errors import UnsupportedEnvironment

B = 4
FIRE = 1


class Played:
    """A group's steps, and beside them what the emulator itself says."""

    def __init__(
        self,
        steps: int,
        *,
        env: str,
        life_loss: bool,
        seed: int = 3,
        action: int | None = None,  # always this one instead of random ones
        **env_kwargs: Any,
    ) -> None:
        self.infos: list[dict[str, NDArray[Any]]] = []
        maker = GroupMaker(env=env, group_size=B, life_loss=life_loss, env_threads=1, env_kwargs=env_kwargs)
        group = SteppedGroup(lambda: self._recording(maker()), seeds=np.random.SeedSequence(seed))
        random = np.random.default_rng(seed)
        transitions = [group.reset()]
        for _ in range(steps):
            chosen = random.integers(group.spec.num_actions, size=B) if action is None else np.full(B, action)
            transitions.append(group.step(chosen))
        group.close()
        self.transitions = transitions
        self.is_first, self.terminated, self.truncated = (
            np.array([np.frombuffer(getattr(each, name), np.bool_) for each in transitions])
            for name in ("is_first", "terminated", "truncated")
        )
        self.rewards = np.array([np.frombuffer(each.reward, np.float32) for each in transitions])
        self.observations = [each.observation[0] for each in transitions]
        self.lives, self.frames = (
            np.array([info[name] for info in self.infos]) for name in ("lives", "episode_frame_number")
        )

    def _recording(self, env: Any) -> Any:
        reset, step = env.reset, env.step

        def recorded(result: Any) -> Any:
            self.infos.append({key: value.copy() for key, value in result[-1].items()})
            return result

        env.reset = lambda **kwargs: recorded(reset(**kwargs))
        env.step = lambda action: recorded(step(action))
        return env

    def episode_ends(self, frame_limit: int) -> NDArray[np.bool_]:
        """By the game's rules: no life left, or so many frames after the first observation. Breakout only."""
        ends = np.zeros_like(self.is_first)
        began = self.frames[0].copy()
        for t in range(len(ends)):
            began = np.where(self.is_first[t], self.frames[t], began)
            ends[t] = (self.lives[t] == 0) | (self.frames[t] - began >= frame_limit)
        return ends


@pytest.mark.parametrize(
    ("frame_limit", "life_loss"),
    [
        (108_000, False),
        (137, True),
        (20, False),
        (1, True),
        pytest.param(108_000, True, marks=pytest.mark.slow),
        pytest.param(137, False, marks=pytest.mark.slow),
        pytest.param(20, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
    ],
)
def test_breakout_starts_episodes_exactly_where_its_rules_say(life_loss: bool, frame_limit: int) -> None:
    played = Played(
        500 if frame_limit > 20 else 150,
        env="ALE/Breakout-v5",
        life_loss=life_loss,
        max_num_frames_per_episode=frame_limit,
    )
    ends = played.episode_ends(frame_limit)
    np.testing.assert_array_equal(played.is_first[1:], ends[:-1])
    assert played.is_first[1:].sum() > 6
    finished = played.terminated | played.truncated
    if life_loss:
        lost = np.diff(played.lives, axis=0) < 0
        np.testing.assert_array_equal(played.terminated[1:], lost & ~played.is_first[1:])
        assert (finished >= ends).all()
    else:
        np.testing.assert_array_equal(finished, ends)


def test_a_life_lost_on_the_very_frame_limit_is_terminated_and_followed_by_a_reset() -> None:
    same = {"env": "ALE/Breakout-v5", "life_loss": True, "action": FIRE, "noop_max": 1}
    free = Played(150, **same)
    lost = int(np.flatnonzero(free.terminated[:, 0])[0])
    assert not free.is_first[lost + 1, 0]
    limit = int(free.frames[lost, 0] - free.frames[0, 0])
    limited = Played(lost + 1, **same, max_num_frames_per_episode=limit)
    assert limited.terminated[lost].all()
    assert not limited.truncated[lost].any()
    assert (limited.lives[lost] == 4).all()
    assert limited.is_first[lost + 1].all()


@pytest.mark.parametrize(
    ("life_loss", "frame_limit", "steps"),
    [
        (True, 108_000, 1000),
        (True, 333, 300),
        (False, 3, 100),
        pytest.param(False, 108_000, 1000, marks=pytest.mark.slow),
    ],
)
def test_pong_which_has_no_lives_starts_episodes_after_ends_only(
    life_loss: bool, frame_limit: int, steps: int
) -> None:
    played = Played(steps, env="ALE/Pong-v5", life_loss=life_loss, max_num_frames_per_episode=frame_limit)
    finished = played.terminated | played.truncated
    np.testing.assert_array_equal(played.is_first[1:], finished[:-1])
    assert played.is_first[1:].sum() >= B
    assert (played.lives == 0).all()
    assert played.truncated.any() == (frame_limit < 108_000)


def test_a_lost_life_changes_nothing_but_the_termination() -> None:
    with_lives, without = (Played(500, env="ALE/Breakout-v5", life_loss=each) for each in (True, False))
    np.testing.assert_array_equal(with_lives.is_first, without.is_first)
    np.testing.assert_array_equal(with_lives.rewards, without.rewards)
    assert with_lives.observations == without.observations
    np.testing.assert_array_equal(with_lives.terminated & (with_lives.lives == 0), without.terminated)
    assert with_lives.terminated.sum() > 4 * without.terminated.sum()
    assert sum(each.episodes for each in with_lives.transitions) == without.is_first[1:].sum()


def test_without_no_ops_every_first_observation_is_the_games_first_frame() -> None:
    played = Played(400, env="ALE/Breakout-v5", life_loss=True, noop_max=1)
    frames = np.stack([np.frombuffer(each, np.uint8).reshape(B, -1) for each in played.observations])
    firsts = frames[played.is_first]
    assert len(firsts) > B
    assert (firsts == frames[0, 0]).all()


def test_rewards_are_raw_and_none_comes_with_a_reset() -> None:
    played = Played(300, env="ALE/Asteroids-v5", life_loss=True)
    assert played.rewards.max() > 1
    assert (played.rewards[played.is_first] == 0).all()


def test_every_option_of_the_vector_environment_is_set() -> None:
    import inspect

    from ale_py.vector_env import AtariVectorEnv

    options = set(inspect.signature(AtariVectorEnv).parameters)
    ours = set(GroupMaker(env="ALE/Pong-v5", group_size=2)._atari_kwargs())
    not_ours = {"game", "num_envs", "batch_size", "thread_affinity_offset", "autoreset_mode"}
    assert options - ours == not_ours | {"continuous_action_threshold"}
    assert ours < options


def test_frames_come_single_and_unstacked() -> None:
    env = GroupMaker(env="ALE/Pong-v5", group_size=2)()
    assert env.single_observation_space.shape == (1, 84, 84)
    assert env.single_action_space == gymnasium.spaces.Discrete(6)
    env.close()


def test_the_users_own_arguments_win() -> None:
    kwargs = {"full_action_space": True, "grayscale": False, "img_height": 64}
    env = GroupMaker(env="ALE/Pong-v5", group_size=2, env_kwargs=kwargs)()
    assert env.single_observation_space.shape == (1, 64, 84, 3)
    assert env.single_action_space == gymnasium.spaces.Discrete(18)
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"frameskip": 0}, "frameskip"), ({"obs_type": "ram"}, "obs_type"), ({"batch_size": 1}, "batch_size")],
)
def test_arguments_that_ale_py_cannot_take_are_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=words):
        GroupMaker(env="ALE/Pong-v5", group_size=2, env_kwargs=kwargs)()


def test_continuous_actions_are_refused_by_name() -> None:
    maker = GroupMaker(env="ALE/Pong-v5", group_size=2, env_kwargs={"continuous": True})
    with pytest.raises(UnsupportedEnvironment, match="action space Box"):
        SteppedGroup(maker, seeds=np.random.SeedSequence(1))


def test_single_atari_environments_have_no_sticky_actions_either() -> None:
    env = GroupMaker(env="ALE/Pong-v5", group_size=1, vectorization="sync")()
    (single,) = env.envs  # type: ignore[attr-defined]
    ale = single._env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == 0.0
    env.close()


def test_the_seed_decides_the_games() -> None:
    one, same, other = (
        Played(60, env="ALE/Pong-v5", life_loss=False, seed=seed).observations for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_environments_without_seeds_play_games_of_their_own() -> None:
    maker = GroupMaker(env="ALE/Pong-v5", group_size=8, env_threads=1)
    last: set[bytes] = set()
    for _ in range(2):
        vector: Any = maker()
        with mock.patch.object(vector, "reset", wraps=vector.reset) as reset:
            group = SteppedGroup(lambda vector=vector: vector, seeds=None)  # type: ignore[misc]
            group.reset()
        reset.assert_called_once_with(seed=None)  # with one, each game would be loaded again
        for _ in range(60):
            frames = group.step(np.full(8, FIRE)).observation[0]
        last |= {frames[row * 84 * 84 : (row + 1) * 84 * 84] for row in range(8)}
        group.close()
    assert len(last) >= 4  # of at most 30, one for each number of no-ops


@pytest.mark.parametrize(
    ("env", "settings", "seeds_itself"),
    [
        ("ALE/Pong-v5", {}, True),
        ("ALE/Pong-v5", {"env_kwargs": {"repeat_action_probability": 0.0}}, True),
        ("ALE/Pong-v5", {"env_kwargs": {"repeat_action_probability": 0.25}}, False),
        ("ALE/Pong-v5", {"vectorization": "sync"}, False),
        ("CartPole-v1", {}, False),
    ],
)
def test_native_games_without_sticky_actions_need_no_seeds(
    env: str, settings: dict[str, Any], seeds_itself: bool
) -> None:
    assert GroupMaker(env=env, group_size=1, **settings).seeds_itself is seeds_itself
