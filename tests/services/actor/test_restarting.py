from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from services.actor.restarting import (
    CRASH,
    MAX_CRASHES_IN_A_ROW,
    REASON,
    RESTARTS,
    CrashCount,
    EnvironmentCrashed,
    EnvironmentMistaken,
    RestartingEnvironment,
    seed_from,
)
from services.actor.results import WrongResult
from tests.support.actor_environments import TroubleEnvironment
from tests.support.counting_environment import CountingEnvironment, Crash

A0 = np.int64(0)


def restarting(**kwargs: Any) -> RestartingEnvironment:
    return RestartingEnvironment(lambda: TroubleEnvironment(lengths=(3,), **kwargs))


def test_an_environment_without_trouble_is_what_it_was() -> None:
    wrapped, bare = restarting(), CountingEnvironment(lengths=(3,))
    np.testing.assert_array_equal(wrapped.reset(seed=4)[0], bare.reset(seed=4)[0])
    for action in (1, 2, 3):
        got, want = wrapped.step(np.int64(action)), bare.step(np.int64(action))
        np.testing.assert_array_equal(got[0], want[0])
        assert got[1:] == want[1:]
    assert wrapped.observation_space == bare.observation_space
    assert wrapped.action_space == bare.action_space


def replaced_at_the_second_step(env: RestartingEnvironment) -> dict[str, Any]:
    """The info of the step in which a new environment took the place of the first."""
    first, _ = env.reset(seed=4)
    assert RESTARTS not in env.step(A0)[4]
    observation, reward, terminated, truncated, info = env.step(A0)
    assert observation[0] != first[0]  # another instance
    assert observation[1:].tolist() == [1, 1]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info[RESTARTS] == 1
    return info


@pytest.mark.parametrize("trouble", ["step", "exit", "close", "cancel"])
def test_a_crash_gives_a_new_environments_first_observation_and_says_so(trouble: str) -> None:
    env = restarting(trouble=trouble, at=2)
    info = replaced_at_the_second_step(env)
    said = {"exit": "window was closed", "cancel": "CancelledError"}
    assert said.get(trouble, "told to crash in step") in info[CRASH]
    assert ("its close() raised Crash" in info[CRASH]) == (trouble == "close")


def test_a_crash_in_reset_is_survived_too(tmp_path: Path) -> None:
    env = restarting(trouble="reset", at=3, marker=str(tmp_path / "made"))
    first, _ = env.reset(seed=4)
    for _ in range(3):
        env.step(A0)
    observation, info = env.reset()
    assert observation[0] != first[0]
    assert info[RESTARTS] == 1


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("nan", "NotFinite: observation 'observation' is not finite as float32: nan"),
        ("inf", "NotFinite: reward is not finite as float32: inf"),
    ],
)
def test_a_number_that_is_not_finite_is_a_crash(trouble: str, said: str) -> None:
    env = restarting(trouble=trouble, at=2)
    info = replaced_at_the_second_step(env)
    assert info[REASON] == said
    assert said in info[CRASH]


def test_a_reset_that_is_not_finite_is_a_crash_also_of_a_replacement(tmp_path: Path) -> None:
    env = restarting(trouble="nan_reset", at=3, marker=str(tmp_path / "made"))
    first, _ = env.reset(seed=4)
    for _ in range(3):
        env.step(A0)
    observation, info = env.reset()
    assert observation[0] != first[0]
    assert info[RESTARTS] == 1
    with pytest.raises(EnvironmentCrashed, match="observation 'observation' is not finite"):
        restarting(trouble="nan_reset", at=0).reset()


def step_that_gives(reward: Any) -> tuple[Any, ...]:
    """What an environment's first step leads to when it gives this reward."""

    class Odd(CountingEnvironment):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            return observation, reward, *rest

    env = RestartingEnvironment(Odd)
    env.reset()
    return env.step(A0)


@pytest.mark.parametrize("reward", [float("nan"), 1e39, "much", "1.0", None, np.zeros(2), [1.0, 2.0], 1j])
def test_a_reward_that_cannot_be_sent_is_a_crash(reward: Any) -> None:
    assert step_that_gives(reward)[4][RESTARTS] == 1


@pytest.mark.parametrize(
    "reward", [2, 2.0, True + True, np.float32(2), np.int8(2), np.array([2.0]), np.array(2)]
)
def test_a_reward_may_be_any_number_also_in_an_array_of_one(reward: Any) -> None:
    given = step_that_gives(reward)[1]
    assert type(given) is float
    assert given == 2.0


def test_the_same_seed_gives_the_same_replacements() -> None:
    def instances() -> list[float]:
        env = restarting(trouble="step", at=2)
        env.reset(seed=11)
        return [env.step(A0)[0][0] for _ in range(8)]

    assert instances() == instances()
    assert len(set(instances())) == 5


def test_crash_after_crash_is_given_up_and_the_last_error_is_named() -> None:
    made = 0

    def make() -> TroubleEnvironment:
        nonlocal made
        made += 1
        return TroubleEnvironment(trouble="step", at=1)

    env = RestartingEnvironment(make)
    env.reset(seed=1)
    for _ in range(MAX_CRASHES_IN_A_ROW - 1):
        env.step(A0)
    with pytest.raises(
        EnvironmentCrashed, match="crashed 10 times in a row, at last with Crash: told to crash"
    ):
        env.step(A0)
    assert made == MAX_CRASHES_IN_A_ROW


def test_a_successful_step_starts_the_count_again() -> None:
    env = restarting(trouble="step", at=2)
    env.reset(seed=1)
    restarts = sum(env.step(A0)[4].get(RESTARTS, 0) for _ in range(6 * MAX_CRASHES_IN_A_ROW))
    assert restarts == 3 * MAX_CRASHES_IN_A_ROW


def test_an_environment_that_cannot_even_be_made_again_is_given_up() -> None:
    made: list[int] = []

    def make() -> TroubleEnvironment:
        if made:
            raise Crash("the simulator is gone")
        made.append(1)
        return TroubleEnvironment(trouble="step", at=1)

    env = RestartingEnvironment(make)
    env.reset(seed=1)
    with pytest.raises(EnvironmentCrashed, match="the simulator is gone"):
        env.step(A0)


@pytest.mark.parametrize(("has_stepped", "kind"), [(False, EnvironmentMistaken), (True, EnvironmentCrashed)])
def test_what_contradicts_itself_from_the_first_is_a_mistake(
    has_stepped: bool, kind: type[EnvironmentCrashed]
) -> None:
    crashes = CrashCount()
    if has_stepped:
        crashes.stepped()
    for _ in range(9):
        crashes.crashed(WrongResult("not so"))
    with pytest.raises(EnvironmentCrashed) as caught:
        crashes.crashed(WrongResult("not so"))
    assert type(caught.value) is kind
    assert caught.value.exit_status == (1 if has_stepped else 2)


def test_one_crash_of_another_kind_makes_it_no_mistake() -> None:
    crashes = CrashCount()
    crashes.crashed(OSError("no simulator"))
    for _ in range(8):
        crashes.crashed(WrongResult("not so"))
    with pytest.raises(EnvironmentCrashed) as caught:
        crashes.crashed(WrongResult("not so"))
    assert caught.value.exit_status == 1


def test_every_environment_that_was_used_up_is_counted_and_said() -> None:
    made = 0

    def make() -> TroubleEnvironment:
        nonlocal made
        made += 1
        if made in (2, 3):
            raise Crash(f"no simulator for the {made}.")
        return TroubleEnvironment(trouble="step", at=1)

    env = RestartingEnvironment(make)
    env.reset(seed=1)
    info = env.step(A0)[4]
    assert info[RESTARTS] == 3
    assert info[REASON] == "Crash: no simulator for the 3."
    assert "no simulator for the 2." in info[CRASH]


def test_an_environment_that_cannot_be_closed_keeps_no_other_from_it() -> None:
    closed: list[int] = []

    class Stubborn(CountingEnvironment):
        def close(self) -> None:
            closed.append(id(self))
            raise Crash("it will not")

    group = SyncVectorEnv([lambda: RestartingEnvironment(Stubborn)] * 3)
    group.close()
    assert len(set(closed)) == 3


def test_closing_closes_the_environment_that_is_there_now() -> None:
    closed: list[int] = []

    class Closing(TroubleEnvironment):
        def close(self) -> None:
            closed.append(id(self))

    made = [Closing(trouble="step", at=1), Closing(trouble="step", at=9)]
    env = RestartingEnvironment(iter(made).__next__)
    env.reset(seed=1)
    env.step(A0)
    env.close()
    assert closed == [id(each) for each in made]


def test_seeds_leave_room_for_a_groups_environments() -> None:
    seeds = np.random.SeedSequence(5)
    drawn = [seed_from(seeds) for _ in range(200)]
    assert len(set(drawn)) == 200
    assert max(drawn) + 65_536 < 2**31
