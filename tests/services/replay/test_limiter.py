import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.replay.limiter import RateLimiter, smallest_error_buffer

RATIOS = st.one_of(st.sampled_from([0.25, 0.75, 1 / 3, 1.0, 8.0]), st.floats(0.01, 100))
ROWS, BATCHES, MIN_SIZES = st.integers(1, 40), st.integers(1, 80), st.integers(1, 300)


def limiter_of(ratio: float, min_size: int, rows: int, batch_size: int) -> RateLimiter:
    buffer = smallest_error_buffer(samples_per_insert=ratio, rows_per_chunk=rows, batch_size=batch_size)
    return RateLimiter(samples_per_insert=ratio, min_size=min_size, error_buffer=max(buffer, ratio))


def restored(limiter: RateLimiter, **changed: Any) -> RateLimiter:
    same = {
        "samples_per_insert": limiter.samples_per_insert,
        "min_size": limiter.min_size,
        "error_buffer": limiter.error_buffer,
        "size": limiter.inserts,
    }
    return RateLimiter.from_state(limiter.state(), **{**same, **changed})


class Table:
    """Says how many items there are, of what was inserted: at most `capacity`."""

    def __init__(self, limiter: RateLimiter, capacity: int, rows: int, batch_size: int) -> None:
        self.limiter, self.capacity = limiter, capacity
        self.rows, self.batch_size = rows, batch_size
        self.size = 0

    def insert(self) -> bool:
        if not self.limiter.may_insert(self.rows, size=self.size):
            return False
        self.limiter.inserted(self.rows)
        self.size = min(self.size + self.rows, self.capacity)
        return True

    def sample(self) -> bool:
        if not self.limiter.may_sample(self.batch_size, size=self.size):
            return False
        self.limiter.sampled(self.batch_size)
        return True


def test_nothing_is_sampled_before_there_are_enough_items_and_inserts_are_free_until_then() -> None:
    limiter = RateLimiter(samples_per_insert=0.5, min_size=100, error_buffer=2)
    assert limiter.may_insert(99, size=0)
    limiter.inserted(99)
    assert not limiter.may_sample(size=99)
    assert limiter.may_insert(1, size=99)
    limiter.inserted(1)
    assert limiter.may_sample(size=100)


def test_each_side_waits_for_the_other_at_the_end_of_its_buffer() -> None:
    limiter = RateLimiter(samples_per_insert=0.5, min_size=100, error_buffer=2)
    limiter.inserted(100)
    assert limiter.may_insert(4, size=100)
    assert not limiter.may_insert(5, size=100)
    assert limiter.may_sample(2, size=100)
    assert not limiter.may_sample(3, size=100)
    limiter.inserted(4)
    assert not limiter.may_insert(1, size=104)
    assert limiter.may_sample(4, size=104)


def test_the_status_says_what_waits_and_for_what() -> None:
    limiter = RateLimiter(samples_per_insert=0.5, min_size=5000, error_buffer=64)
    limiter.inserted(312)
    assert limiter.words(size=312) == "samples wait: 312 of 5,000 items"
    limiter.inserted(4688)
    assert limiter.words(size=5000, rows=8, batch_size=32) == "free"
    limiter.sampled(64)
    assert limiter.words(size=5000, rows=8, batch_size=32) == "samples wait: 64 more items to be inserted"
    limiter.inserted(250)
    assert limiter.words(size=5250, rows=8, batch_size=32) == "inserts wait: 1 more items to be sampled"


@given(RATIOS, MIN_SIZES, ROWS, BATCHES, st.integers(0, 500), st.lists(st.booleans(), max_size=300))
def test_never_do_both_sides_wait(
    ratio: float, min_size: int, rows: int, batch_size: int, above: int, wishes: list[bool]
) -> None:
    limiter = limiter_of(ratio, min_size, rows, batch_size)
    table = Table(limiter, min_size + above, rows, batch_size)
    for wish in itertools.chain([True] * (min_size // rows + 1), wishes):
        done = table.insert() if wish else table.sample()
        assert done or (table.sample() if wish else table.insert())
        table.limiter = restored(table.limiter)


@given(RATIOS, MIN_SIZES, ROWS, BATCHES, st.integers(0, 400), st.data())
def test_neither_do_they_after_a_restart_with_the_table_full_or_half_lost(
    ratio: float, min_size: int, rows: int, batch_size: int, steps: int, data: st.DataObject
) -> None:
    table = Table(limiter_of(ratio, min_size, rows, batch_size), min_size, rows, batch_size)
    for step in range(min_size // rows + 1 + steps):
        if not (table.insert() if step % 2 else table.sample()):
            table.insert()
    new_ratio, new_min_size = data.draw(RATIOS), data.draw(st.integers(1, min_size))
    buffer = limiter_of(new_ratio, new_min_size, rows, batch_size).error_buffer
    table.limiter = restored(
        table.limiter, samples_per_insert=new_ratio, min_size=new_min_size, error_buffer=buffer
    )
    table.size = data.draw(st.sampled_from([table.size, table.size // 2, 0]))
    for wish in data.draw(st.lists(st.booleans(), max_size=60)):
        done = table.insert() if wish else table.sample()
        assert done or (table.sample() if wish else table.insert())


@settings(max_examples=30)
@given(RATIOS, ROWS, BATCHES, st.sampled_from(["insert", "sample", "turns"]))
def test_over_a_long_run_the_samples_stay_within_the_buffer_whoever_is_eager(
    ratio: float, rows: int, batch_size: int, eager: str
) -> None:
    limiter = limiter_of(ratio, 50, rows, batch_size)
    table = Table(limiter, 200, rows, batch_size)
    while table.size < 50:
        table.insert()
    surplus = limiter.inserts - 50  # of the message that completed the minimum
    for turn in range(2000):
        first, second = (table.insert, table.sample) if eager == "insert" else (table.sample, table.insert)
        if (eager == "turns" and turn % 2 and second()) or first() or second():
            ideal = (limiter.inserts - 50) * ratio
            assert abs(limiter.samples - ideal) <= limiter.error_buffer + surplus * ratio + 1e-6
    assert limiter.samples > 0


def test_the_state_goes_on_where_it_was() -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=10, error_buffer=20)
    limiter.inserted(30)
    limiter.sampled(11)
    again = restored(limiter)
    assert again.state() == limiter.state()
    assert again.balance == limiter.balance


@pytest.mark.parametrize("ratio", [0.1, 8.0])
def test_another_ratio_counts_from_the_restart_only(ratio: float) -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=10, error_buffer=20)
    limiter.inserted(1_000_010)
    limiter.sampled(750_000)
    again = restored(limiter, samples_per_insert=ratio)
    assert again.balance == pytest.approx(0)
    assert (again.inserts, again.samples) == (1_000_010, 750_000)


def test_a_smaller_buffer_holds_at_once_with_another_ratio() -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=10, error_buffer=20)
    limiter.inserted(10)
    limiter.sampled(20)
    again = restored(limiter, samples_per_insert=1.0, error_buffer=5)
    assert again.balance == -5


def test_samples_from_a_table_that_had_just_filled_are_not_forgotten_with_a_smaller_minimum() -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=10, error_buffer=20)
    limiter.inserted(10)
    limiter.sampled(8)
    assert restored(limiter, min_size=4).balance == limiter.balance == -8


def test_a_restart_while_the_table_fills_takes_the_new_minimum() -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=100, error_buffer=20)
    limiter.inserted(50)
    again = restored(limiter, min_size=200)
    again.inserted(150)
    assert again.balance == 0


def test_a_larger_minimum_lets_the_table_grow_to_it_without_a_debt() -> None:
    limiter = RateLimiter(samples_per_insert=0.75, min_size=10, error_buffer=20)
    limiter.inserted(200)
    limiter.sampled(140)
    again = restored(limiter, min_size=5000, size=180)
    again.inserted(5000 - 180)
    assert again.balance == pytest.approx(limiter.balance)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"samples_per_insert": 0.0}, "samples_per_insert"),
        ({"samples_per_insert": float("nan")}, "samples_per_insert"),
        ({"min_size": 0}, "min_size"),
        ({"error_buffer": 0.5}, "error_buffer"),
        ({"error_buffer": float("inf")}, "error_buffer"),
        ({"samples_per_insert": 8.0, "error_buffer": 7.0}, "error_buffer"),
    ],
)
def test_values_that_could_withhold_both_sides_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RateLimiter(**{"samples_per_insert": 1.0, "min_size": 1, "error_buffer": 2.0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken", [{"inserts": -1}, {"samples": "many"}, {"offset": float("nan")}, {"inserts": float("inf")}]
)
def test_a_broken_state_is_refused_in_words(broken: dict[str, Any]) -> None:
    limiter = RateLimiter(samples_per_insert=1.0, min_size=1, error_buffer=2.0)
    with pytest.raises(ValueError, match="no limiter's state"):
        RateLimiter.from_state(
            {**limiter.state(), **broken}, samples_per_insert=1.0, min_size=1, error_buffer=2.0, size=1
        )
    with pytest.raises(ValueError, match="no limiter's state"):
        RateLimiter.from_state({}, samples_per_insert=1.0, min_size=1, error_buffer=2.0, size=1)
