"""The words for what is no result of step() or reset()."""

from typing import Any

import gymnasium
import pytest

from services.actor.results import WrongResult, explained, first_and_info, wrong_count
from tests.support.counting_environment import CountingEnvironment

STEP = "(observation, reward, terminated, truncated, info)"


def test_a_reset_gives_an_observation_and_its_info() -> None:
    assert first_and_info(("seen", {"a": 1})) == ("seen", {"a": 1})


@pytest.mark.parametrize(
    ("result", "given"),
    [
        ({"a": 1, "b": 2}, r"one value \(dict\)"),  # which would come apart into its keys
        (None, r"one value \(NoneType\)"),
        ((1, 2, 3), "3 values"),
    ],
)
def test_another_thing_than_a_pair_is_no_reset(result: Any, given: str) -> None:
    with pytest.raises(
        WrongResult, match=rf"^reset\(\) returned {given} instead of 2 \(observation, info\)$"
    ):
        first_and_info(result)


def test_a_step_of_another_length_is_told_with_what_it_should_hold() -> None:
    assert str(wrong_count("step", (1, 2, 3, 4))) == f"step() returned 4 values instead of 5 {STEP}"


class Sloppy(CountingEnvironment):
    """Whatever it is told to return from a step."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def step(self, action: Any) -> Any:
        return self._result


class OfAUser(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Takes a step apart wrongly itself."""

    def step(self, action: Any) -> Any:
        observation, reward = self.env.step(action)
        return observation, reward


@pytest.mark.parametrize(
    ("result", "given"),
    [
        ((1, 2, 3, 4), "4 values"),
        (tuple(range(6)), "another number of values"),
        (None, "one value (NoneType)"),
    ],
)
def test_what_a_wrapper_of_gymnasiums_could_not_take_apart_is_told(result: Any, given: str) -> None:
    env = gymnasium.wrappers.TimeLimit(Sloppy(result), 9)
    with pytest.raises((TypeError, ValueError)) as caught:
        env.step(0)
    wrong = explained(caught.value)
    assert isinstance(wrong, WrongResult)
    assert str(wrong).startswith(f"step() returned {given}")
    assert wrong.__cause__ is caught.value


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(ValueError, match="too many values") as caught:
        OfAUser(Sloppy((1, 2, 3))).step(0)
    assert explained(caught.value) is caught.value
    assert explained(KeyError("b")).args == ("b",)
