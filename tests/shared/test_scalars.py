"""Numbers and truth values as they may be given."""

from typing import Annotated, Any

import pytest
from pydantic import Field

from shared.scalars import as_given

Positive = Annotated[int, Field(ge=1)]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e6", 1_000_000), ("2.4e7", 24_000_000), ("1_5E+2", 1500), ("-3e0", -3), ("20e-1", 2), (" 1e1 ", 10)],
)
@pytest.mark.parametrize("kind", [int, int | None, Positive | None])
def test_whole_numbers_may_be_in_scientific_notation(kind: Any, text: str, number: int) -> None:
    assert as_given(text, kind) == number
    assert as_given([text, 2], tuple[Positive, ...]) == [number, 2]


@pytest.mark.parametrize("text", ["1.5", "15e-1", "1e400", "1e", "e6", "many", "1000000", ""])
def test_what_is_no_whole_number_in_scientific_notation_is_left_alone(text: str) -> None:
    assert as_given(text, int) == text


@pytest.mark.parametrize("kind", [float, str, str | None, dict[str, Any], bool])
def test_settings_of_other_kinds_are_left_alone(kind: Any) -> None:
    assert as_given("1e6", kind) == "1e6"


@pytest.mark.parametrize("kind", [int, float, int | None, Positive | None])
def test_a_truth_value_is_no_number(kind: Any) -> None:
    with pytest.raises(ValueError, match="must be a number, not true or false"):
        as_given(True, kind)
    with pytest.raises(ValueError, match="must be a number"):
        as_given([1, True], tuple[kind, ...])


def test_a_number_is_no_truth_value() -> None:
    with pytest.raises(ValueError, match="must be true or false, not a number"):
        as_given(1, bool)
    assert as_given(True, bool) is True
    assert as_given("1", bool) == "1"


def test_what_is_in_a_mapping_is_left_alone() -> None:
    assert as_given({"flag": True, "count": "1e6"}, dict[str, Any]) == {"flag": True, "count": "1e6"}
