import os
import re
import signal
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv
from numpy.typing import NDArray
from structlog.testing import capture_logs

from services.actor.environments import GroupMaker
from services.actor.restarting import EnvironmentCrashed, EnvironmentMistaken
from services.actor.stepping import SteppedGroup, Transition, closed
from shared.errors import UnsupportedEnvironment
from tests.support.counting_environment import reward_of

COUNTING = "tests.support.counting_environment:Counting-v0"
COUNTING_VECTOR = "tests.support.counting_environment:CountingVector-v0"
TALKATIVE = "tests.support.actor_environments:Talkative-v0"
TROUBLE = "tests.support.actor_environments:Trouble-v0"
ODD = "tests.support.actor_environments:Odd-v0"
ODD_LIMITED = "tests.support.actor_environments:OddLimited-v0"
ODD_VECTOR = "tests.support.actor_environments:OddVector-v0"
NEXT_STEP = "tests.support.actor_environments:NextStep-v0"
B = 3


def group(env: str, *, seed: int = 1, size: int = B, **kwargs: Any) -> SteppedGroup:
    maker = GroupMaker(env=env, group_size=size, **kwargs)
    return SteppedGroup(maker, seeds=np.random.SeedSequence(seed))


class Seen:
    """Transitions put together: [T, B, …]."""

    def __init__(self, transitions: list[Transition], size: int = B) -> None:
        def rows(name: str, dtype: Any) -> NDArray[Any]:
            return np.frombuffer(b"".join(getattr(each, name) for each in transitions), dtype).reshape(
                -1, size
            )

        self.observation = np.frombuffer(
            b"".join(each.observation[0] for each in transitions), np.float32
        ).reshape(len(transitions), size, -1)
        self.reward = rows("reward", np.float32)
        self.terminated, self.truncated, self.is_first = (
            rows(name, np.bool_) for name in ("terminated", "truncated", "is_first")
        )
        self.counts = np.array([each[5:] for each in transitions]).sum(axis=0).tolist()


def played(stepped: SteppedGroup, steps: int, actions: Any = None) -> Seen:
    actions = np.arange(steps * stepped.size).reshape(steps, -1) % stepped.spec.num_actions
    return Seen([stepped.reset(), *(stepped.step(action) for action in actions)], stepped.size)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_every_number_of_a_group_is_where_it_belongs(way: Any, truncate: bool) -> None:
    stepped = group(COUNTING, vectorization=way, env_kwargs={"truncate": truncate})
    seen = played(stepped, 60)
    stepped.close()
    _check_counting(seen, truncate=truncate, lives=0)


@pytest.mark.parametrize("way", ["sync", "async"])
def test_infos_of_any_kind_disturb_nothing(way: Any) -> None:
    stepped = group(TALKATIVE, vectorization=way)
    seen = played(stepped, 60)
    stepped.close()
    _check_counting(seen, truncate=False, lives=0)


@pytest.mark.parametrize("life_every", [0, 2])
def test_a_native_environments_resets_are_told_from_its_lost_lives(life_every: int) -> None:
    stepped = group(COUNTING_VECTOR, env_kwargs={"life_every": life_every})
    _check_counting(played(stepped, 60), truncate=False, lives=life_every)


def _check_counting(seen: Seen, *, truncate: bool, lives: int) -> None:
    """The counting environment's whole story: lengths 5, 3, 1, 8 over and over."""
    lengths = (5, 3, 1, 8)
    actions = np.arange((len(seen.is_first) - 1) * B).reshape(-1, B) % 16
    for row in range(B):
        instance = seen.observation[0, row, 0]
        episode, step = 1, 1
        for t in range(len(seen.is_first)):
            assert seen.observation[t, row].tolist() == [instance, episode, step]
            length = lengths[(episode - 1) % 4]
            ended = step == length + 1
            assert seen.is_first[t, row] == (step == 1)
            lost_life = bool(lives) and step > 1 and (step - 1) % lives == 0
            assert seen.terminated[t, row] == ((ended and not truncate) or lost_life)
            assert seen.truncated[t, row] == (ended and truncate)
            if step == 1:
                assert seen.reward[t, row] == 0
            else:
                assert seen.reward[t, row] == reward_of(seen.observation[t - 1, row], actions[t - 1, row])
            episode, step = (episode + 1, 1) if ended else (episode, step + 1)
    resets = int(seen.is_first[1:].sum())
    assert seen.counts == [seen.is_first[1:].size - resets, resets, resets, 0]


def test_native_and_single_cartpoles_tell_the_same_story() -> None:
    for way in ("native", "sync"):
        seen = played(group("CartPole-v1", vectorization=way, size=B), 400)
        ended = seen.terminated | seen.truncated
        np.testing.assert_array_equal(seen.is_first[1:], ended[:-1])
        np.testing.assert_array_equal(seen.reward[1:], np.where(seen.is_first[1:], 0.0, 1.0))
        assert (np.abs(seen.observation[seen.is_first]) <= 0.05).all()
        assert (np.abs(seen.observation[ended][:, [0, 2]]) > [2.4, 0.2095]).any(axis=1).all()
        assert seen.is_first.sum() > 3 * B
        assert not (ended & seen.is_first).any()


def test_a_second_reset_starts_new_episodes_in_all_rows() -> None:
    stepped = group(COUNTING)
    played(stepped, 3)
    again = played(stepped, 5)
    assert again.is_first[0].all()
    assert again.observation[0, :, 1:].tolist() == [[2, 1]] * B
    assert again.is_first[1:].sum() == B  # the episode of length 3 ended; nothing is left of the one before


def test_later_resets_do_not_play_the_same_episodes_again() -> None:
    for way in ("native", "sync"):
        stepped = group("CartPole-v1", vectorization=way)
        assert stepped.reset().observation != stepped.reset().observation


def test_seeds_decide_the_episodes() -> None:
    one, same, other = (played(group("CartPole-v1", seed=seed), 20).observation for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one[0] != other[0]).all()


def test_an_action_space_with_a_start_gets_its_own_actions() -> None:
    from gymnasium import spaces

    kwargs = {"observation_space": spaces.Box(0, 1, (1,)), "action_space": spaces.Discrete(3, start=-1)}
    stepped = group("tests.support.actor_environments:Spaces-v0", env_kwargs=kwargs)
    stepped.reset()
    stepped.step(np.array([0, 1, 2]))  # it asserts that its space contains them
    assert stepped.spec.num_actions == 3


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("trouble", ["step", "exit", "nan", "inf"])
def test_one_crashed_environment_begins_anew_and_the_others_go_on(
    way: Any, trouble: str, tmp_path: Path
) -> None:
    kwargs = {"trouble": trouble, "at": 4, "marker": str(tmp_path / "made"), "lengths": (100,)}
    stepped = group(TROUBLE, vectorization=way, env_kwargs=kwargs)
    seen = played(stepped, 10)
    stepped.close()
    assert seen.is_first[1:].sum() == 1
    t, row = (int(index[0]) for index in np.nonzero(seen.is_first[1:]))
    t += 1
    assert t == 4
    assert seen.observation[t, row, 1:].tolist() == [1, 1]
    assert seen.observation[t, row, 0] != seen.observation[t - 1, row, 0]
    assert seen.reward[t, row] == 0
    assert not (seen.terminated | seen.truncated).any()
    others = [other for other in range(B) if other != row]
    assert (seen.observation[:, others, 2] == np.arange(1, 12)[:, None]).all()
    assert seen.counts == [10 * B - 1, 1, 0, 1]  # no episode came to its end
    said = {
        "step": "Crash: told",
        "exit": "SystemExit: the",
        "nan": "NotFinite: obs",
        "inf": "NotFinite: rew",
    }
    assert stepped.last_crash.startswith(said[trouble])


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_crash_in_the_reset_after_an_end_is_one_reset_step(way: Any, tmp_path: Path) -> None:
    kwargs = {"trouble": "reset", "at": 3, "marker": str(tmp_path / "made"), "lengths": (3,)}
    stepped = group(TROUBLE, vectorization=way, env_kwargs=kwargs)
    seen = played(stepped, 7)
    stepped.close()
    assert seen.is_first.tolist() == [[t in (0, 4)] * B for t in range(8)]
    assert sorted(seen.observation[4, :, 1].tolist()) == [1, 2, 2]  # one is a new instance in its episode 1
    assert seen.counts[1:] == [B, B, 1]


@pytest.mark.filterwarnings("ignore:.*Worker-|.*Traceback|.*Raising the last:UserWarning")
@pytest.mark.parametrize(
    ("trouble", "said"),
    [("step", "told to crash in step"), ("nan", "observation 'observation' is not finite")],
)
@pytest.mark.parametrize("way", ["sync", "async"])
def test_crash_after_crash_ends_the_group(way: Any, trouble: str, said: str) -> None:
    stepped = group(TROUBLE, vectorization=way, env_kwargs={"trouble": trouble, "at": 1})
    stepped.reset()
    with pytest.raises(EnvironmentCrashed, match=f"crashed 10 times in a row.*{said}"):
        _step_often(stepped)
    stepped.close()


def test_a_native_environment_that_raises_is_rebuilt_whole() -> None:
    stepped = group(NEXT_STEP, env_kwargs={"raise_at": 4})
    seen = played(stepped, 9)
    assert seen.observation[:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert [row.all() for row in seen.is_first] == [t in (0, 4, 8) for t in range(10)]
    assert (seen.reward == np.where(seen.is_first, 0, 7)).all()
    assert seen.counts == [7 * B, 2 * B, 0, 2 * B]


@pytest.mark.parametrize("nan_reward", [False, True])
def test_a_native_environment_with_a_number_that_is_not_finite_is_rebuilt_whole(nan_reward: bool) -> None:
    stepped = group(NEXT_STEP, env_kwargs={"nan_at": 4, "nan_reward": nan_reward})
    seen = played(stepped, 9)
    assert seen.observation[:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert (seen.reward == np.where(seen.is_first, 0, 7)).all()
    assert seen.counts == [7 * B, 2 * B, 0, 2 * B]
    assert "reward is not finite" in stepped.last_crash or not nan_reward


def test_a_native_environment_that_is_never_finite_is_given_up() -> None:
    stepped = group(NEXT_STEP, env_kwargs={"nan_at": 1})
    stepped.reset()
    with pytest.raises(EnvironmentCrashed, match=r"10 times in a row.*'observation' is not finite"):
        _step_often(stepped)


def test_crashes_do_not_fill_the_log() -> None:
    stepped = group(NEXT_STEP, env_kwargs={"raise_at": 2})
    with capture_logs() as logs:
        played(stepped, 60)
    assert len(logs) == 10


def test_crashes_with_steps_between_them_are_never_too_many() -> None:
    assert played(group(NEXT_STEP, env_kwargs={"raise_at": 2}), 60).counts[3] == 30 * B


def test_results_may_be_read_only() -> None:
    """As the arrays of some libraries are."""
    stepped = group(NEXT_STEP, env_kwargs={"end_at": 2})
    step = stepped._env.step

    def read_only(actions: Any) -> Any:
        *results, info = step(actions)
        for result in results:
            result.setflags(write=False)
        return *results, info

    stepped._env.step = read_only  # type: ignore[method-assign]
    assert played(stepped, 6).counts[3] == 0


def test_a_reset_without_arrays_ends_the_use_of_those_before() -> None:
    stepped = group(NEXT_STEP)
    assert stepped.reset(into=[np.zeros((B, 1), np.float32)]).observation == []
    assert played(stepped, 2).observation[:, 0, 0].tolist() == [0, 1, 2]


def test_nothing_but_the_observation_counts_in_a_reset_step() -> None:
    seen = played(group(NEXT_STEP, env_kwargs={"end_at": 2}), 6)
    assert seen.observation[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert seen.is_first[:, 0].tolist() == [1, 0, 0, 1, 0, 0, 1]
    assert seen.reward[:, 0].tolist() == [0, 7, 7, 0, 7, 7, 0]
    assert seen.terminated[:, 0].tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert not seen.truncated.any()
    assert seen.counts[3] == 0  # although rewards are NaN there


def test_a_native_environment_that_raises_again_and_again_is_given_up() -> None:
    stepped = group(NEXT_STEP, env_kwargs={"raise_at": 1})
    stepped.reset()
    with pytest.raises(EnvironmentCrashed, match=r"10 times in a row.*the vector environment was told"):
        _step_often(stepped)


def _step_often(stepped: SteppedGroup) -> None:
    for _ in range(11):
        stepped.step(np.zeros(B, np.int64))


def _reset_and_step_often(stepped: SteppedGroup) -> None:
    with capture_logs():  # tracebacks take a second each to print
        stepped.reset()
        _step_often(stepped)


def _workers(stepped: SteppedGroup) -> AsyncVectorEnv[Any, Any]:
    env = stepped._env
    assert isinstance(env, AsyncVectorEnv)
    return env


def test_a_killed_process_is_replaced_with_its_whole_group() -> None:
    stepped = group(COUNTING, vectorization="async", env_kwargs={"lengths": (100,)})
    seen = [stepped.reset(), stepped.step(np.zeros(B, np.int64))]
    before = _workers(stepped).processes
    victim = before[1].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    seen += [stepped.step(np.zeros(B, np.int64)) for _ in range(3)]
    assert not any(process.is_alive() for process in before)
    stepped.close()
    result = Seen(seen)
    assert [row.all() for row in result.is_first] == [True, False, True, False, False]
    assert result.observation[:, 0, 2].tolist() == [1, 2, 1, 2, 3]
    assert result.counts == [3 * B, B, 0, B]


def test_a_process_that_ends_itself_is_replaced_with_its_whole_group(tmp_path: Path) -> None:
    kwargs = {"trouble": "die", "at": 2, "marker": str(tmp_path / "made"), "lengths": (100,)}
    stepped = group(TROUBLE, vectorization="async", env_kwargs=kwargs)
    seen = played(stepped, 4)
    stepped.close()
    assert [row.all() for row in seen.is_first] == [True, False, True, False, False]


def test_closing_leaves_no_process_not_even_one_that_hangs() -> None:
    stepped = group(TROUBLE, vectorization="async", env_kwargs={"trouble": "hang", "at": 1}, size=2)
    stepped.reset()
    env = _workers(stepped)
    env.step_async(np.zeros(2, np.int64))
    began = time.monotonic()
    closed(env)
    assert time.monotonic() - began < 2.0
    assert not any(process.is_alive() for process in env.processes)


def test_closing_in_good_order_lets_the_environments_close() -> None:
    stepped = group(COUNTING, vectorization="async")
    stepped.reset()
    env = _workers(stepped)
    stepped.close()
    assert [process.exitcode for process in env.processes] == [0] * B


def test_observations_that_do_not_fit_their_space_end_the_group() -> None:
    stepped = group(NEXT_STEP)
    stepped._env.reset = lambda **_: (np.zeros((B, 2)), {})  # type: ignore[method-assign]
    with pytest.raises(UnsupportedEnvironment, match=r"shape \[3, 2\]"):
        stepped.reset()


STEP = "(observation, reward, terminated, truncated, info)"
TRANSPOSED = "observation 'b' has shape [3, 2]; its space says [2, 3]"


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(
    ("env", "odd", "said"),
    [
        (ODD, "step4", f"step() returned 4 values instead of 5 {STEP}"),
        (ODD_LIMITED, "step4", f"step() returned 4 values instead of 5 {STEP}"),
        (ODD, "step_none", f"step() returned one value (NoneType) instead of 5 {STEP}"),
        (ODD_LIMITED, "step_none", f"step() returned one value (NoneType) instead of 5 {STEP}"),
        (ODD, "reset_bare", "reset() returned one value (dict) instead of 2 (observation, info)"),
        (ODD, "key", "the observation lacks the key 'b'"),
        (ODD, "shape", "observation 'b' has shape [3]; its space says [2, 3]"),
        (ODD, "transposed", TRANSPOSED),
    ],
)
def test_a_wrong_result_is_put_in_words(env: str, odd: str, said: str, integers: bool) -> None:
    stepped = group(env, vectorization="sync", env_kwargs={"odd": odd, "integers": integers})
    words = re.escape(f"10 times in a row, at last with WrongResult: {said}")
    with pytest.raises(EnvironmentMistaken, match=words):
        _reset_and_step_often(stepped)


@pytest.mark.filterwarnings("ignore:.*Worker-|.*Traceback|.*Raising the last:UserWarning")
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("step4", f"step() returned 4 values instead of 5 {STEP}"),
        ("key", "the observation lacks the key 'b'"),
        ("transposed", TRANSPOSED),  # as many values as it should have, in another order
        ("dtype", "observation 'b' is float64; its space says uint8"),
        ("wide", "observation 'b' is uint16 with values beyond uint8"),
    ],
)
def test_a_wrong_result_in_a_process_of_its_own_is_put_in_words(odd: str, said: str) -> None:
    stepped = group(ODD_LIMITED, vectorization="async", env_kwargs={"odd": odd, "integers": True})
    words = re.escape(f"10 times in a row, at last with WrongResult: {said}")
    with pytest.raises(EnvironmentMistaken, match=words):
        _reset_and_step_often(stepped)
    stepped.close()


@pytest.mark.parametrize("odd", ["key", "shape"])
def test_a_group_goes_on_after_an_observation_that_does_not_fit_its_space(odd: str) -> None:
    stepped = group(ODD, vectorization="sync", env_kwargs={"odd": odd, "at": 2, "integers": True})
    stepped.reset()
    with capture_logs() as logs:
        restarts = [stepped.step(np.zeros(B, np.int64)).restarts for _ in range(30)]
    assert restarts == [0, B] * 15
    # Each by itself: where one is wrong, the others go on.
    assert {entry["event"] for entry in logs} == {"environment crashed and was replaced"}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_flags_may_be_arrays_of_one(vectorization: Literal["sync", "async"]) -> None:
    stepped = group(ODD, vectorization=vectorization, env_kwargs={"odd": "flags"})
    stepped.reset()
    assert [stepped.step(np.zeros(B, np.int64)).restarts for _ in range(3)] == [0] * 3
    stepped.close()


def test_a_flag_that_is_two_is_its_environments_crash() -> None:
    stepped = group(ODD, vectorization="sync", env_kwargs={"odd": "flag_pairs", "at": 2})
    stepped.reset()
    with capture_logs() as logs:
        assert stepped.step(np.zeros(B, np.int64)).restarts == B
    assert {entry["event"] for entry in logs} == {"environment crashed and was replaced"}
    assert "truth value of an array" in stepped.last_crash


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("dtype", "observation 'b' is float64; its space says uint8"),
        ("wide", "observation 'b' is uint16 with values beyond uint8"),
    ],
)
def test_a_dtype_that_a_space_does_not_hold_is_named(odd: str, said: str) -> None:
    stepped = group(ODD, vectorization="sync", env_kwargs={"odd": odd})
    with pytest.raises(EnvironmentCrashed, match=said):
        _reset_and_step_often(stepped)


def test_a_leaf_that_is_no_number_is_named() -> None:
    stepped = group(ODD, vectorization="sync", env_kwargs={"odd": "words"})
    with pytest.raises(EnvironmentCrashed, match="observation 'b' is str128; its space says float32"):
        _reset_and_step_often(stepped)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("step4", f"step() returned 4 values instead of 5 {STEP}"),
        ("reset_bare", "reset() returned one value (ndarray) instead of 2 (observation, info)"),
        ("key", "the observation lacks the key 'b'"),
        ("column", "reward has shape [3, 1]; a group of 3 has [3]"),
    ],
)
def test_a_native_environments_wrong_result_is_put_in_words(odd: str, said: str) -> None:
    stepped = group(ODD_VECTOR, env_kwargs={"odd": odd})
    with pytest.raises(EnvironmentCrashed, match=re.escape(f"at last with WrongResult: {said}")):
        _reset_and_step_often(stepped)


def test_a_native_environment_may_write_into_its_actions() -> None:
    stepped = group(ODD_VECTOR, env_kwargs={"odd": "writes"})
    stepped.reset()
    actions = np.ones(B, np.int64)
    actions.flags.writeable = False
    assert stepped.step(actions).restarts == 0
