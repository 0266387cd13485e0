"""Speeds."""

import pytest

from services.learner.rates import Rates, Sample


def sample(time: float, *, steps: int | None = None) -> Sample:
    return Sample(
        time,
        steps=int(time * 100) if steps is None else steps,
        updates=int(time * 2),
        training_seconds=time / 4,
        waiting_seconds=time / 2,
    )


def test_before_two_samples_there_is_no_speed() -> None:
    rates = Rates()
    rates.add(sample(1.0))
    assert set(rates.per_second().values()) == {0.0}


def test_speeds_are_differences_over_time() -> None:
    rates = Rates()
    for time in range(10, 15):
        rates.add(sample(time))
    assert rates.per_second() == pytest.approx(
        {"steps_per_second": 100, "updates_per_second": 2, "training_share": 0.25, "waiting_share": 0.5}
    )


def test_what_is_older_than_the_window_does_not_count() -> None:
    rates = Rates(window_seconds=10.0)
    for time in range(100):
        rates.add(sample(time, steps=max(0, time - 50) * 7))
    assert rates.per_second()["steps_per_second"] == pytest.approx(7.0)
