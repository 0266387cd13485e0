"""Looks become rare where the wait is long, and stay within their limits."""

import pytest

from services.inference.pace import Pace


@pytest.mark.parametrize(("waited", "seconds"), [(0.8, 0.2), (0.01, 0.02), (60.0, 0.4)])
def test_looks_are_a_quarter_of_the_last_wait_apart_within_limits(waited: float, seconds: float) -> None:
    pace = Pace(first=0.1, least=0.02, most=0.4)
    assert pace.seconds == 0.1
    pace.waited(waited)
    assert pace.seconds == pytest.approx(seconds)
