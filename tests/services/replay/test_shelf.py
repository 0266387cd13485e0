import contextlib
import random

import numpy as np
import pytest

from services.replay.shelf import Shelf
from shared.algorithms.priorities import sequence_priorities
from shared.errors import ConfigurationError, Refused
from tests.support.replay_runs import UNROLL
from tests.support.replay_shelves import Messages, shelf_of


def fill(shelf: Shelf, messages: Messages, count: int, td_error: float | None = None) -> None:
    for _ in range(count):
        rows = messages.next(td_error)
        shelf.admit(len(rows.records))
        shelf.insert(rows, now=0.0)


def probabilities(shelf: Shelf) -> dict[tuple[bytes, ...], float]:
    """By the number and row of each chunk of an item."""
    sampled = shelf.table.sample(3000, now=0.0)
    return {
        tuple(record.split()[0] for record in rows): float(p)
        for rows, p in zip(sampled.rows, sampled.probabilities, strict=True)
    }


def test_a_sequence_has_the_priority_of_its_steps_after_burn_in_that_count() -> None:
    burn_in, length = 3, 2 * UNROLL  # so the last chunk's last step is beyond the sequence
    shelf = shelf_of(burn_in=burn_in, sequence_length=length, priority_exponent=1.0)
    messages = Messages(rows=1)
    errors = np.random.default_rng(5).normal(size=(5, UNROLL)).astype(np.float32)
    errors[0, :burn_in] = errors[2, -1] = 100.0
    errors[2, :burn_in] = 50.0  # in the first sequence, but in the second one's burn-in
    resets = np.zeros((5, UNROLL), np.bool_)
    resets[1, 1] = True
    errors[1, 1] = -200.0
    for each, reset in zip(errors, resets, strict=True):
        shelf.insert(messages.next()._replace(td_errors=each[None], reset_steps=reset[None]), now=0.0)
    told = probabilities(shelf)
    first, second = (slice(begin + burn_in, begin + burn_in + length) for begin in (0, 8))
    expected = [
        float(sequence_priorities(errors.reshape(1, -1)[:, steps], ~resets.reshape(1, -1)[:, steps], 0.9)[0])
        for steps in (first, second)
    ]
    assert told == {
        (b"0/0", b"1/0", b"2/0"): pytest.approx(expected[0] / sum(expected)),
        (b"2/0", b"3/0", b"4/0"): pytest.approx(expected[1] / sum(expected)),
    }
    assert 45 < expected[0] < 60


def test_items_that_a_message_does_not_complete_and_rows_that_come_again_do_not_count_as_inserts() -> None:
    shelf = shelf_of(burn_in=UNROLL, sequence_length=UNROLL)
    messages = Messages(rows=2)
    first, second = messages.next(), messages.next()
    told = [shelf.insert(rows, now=0.0) for rows in (first, second, second)]
    assert [(inserted.items, inserted.stale) for inserted in told] == [(0, 0), (2, 0), (0, 2)]
    assert shelf.limiter.inserts == shelf.table.inserts == 2


def test_the_error_buffer_grows_with_the_messages_so_that_neither_side_starves() -> None:
    shelf = shelf_of(replay_ratio=2.0, batch_size=8)
    assert shelf.limiter.error_buffer == 16
    shelf.admit(4)
    assert shelf.limiter.error_buffer == 16
    shelf.admit(20)
    assert shelf.limiter.error_buffer == 80
    shelf.admit(3)
    assert (shelf.limiter.error_buffer, shelf.largest_rows) == (80, 20)
    given = shelf_of(replay_ratio=2.0, batch_size=8, rate_limiter_error_buffer=40)
    given.admit(10)
    assert given.limiter.error_buffer == 40
    with pytest.raises(ConfigurationError, match="40 is too small for messages of 11 rows"):
        given.admit(11)


def test_the_largest_sample_that_is_not_refused_comes_about() -> None:
    for rows, ratio, batch_size in ((3, 0.7, 4), (16, 2.0, 8), (1, 5.0, 3)):
        shelf = shelf_of(replay_ratio=ratio, batch_size=batch_size, replay_capacity=10_000)
        messages = Messages(rows=rows)
        shelf.admit(rows)
        largest = int(2 * shelf.limiter.error_buffer - rows * ratio)
        shelf.check_sample(largest)
        with pytest.raises(Refused, match=rf"there can be {largest}"):
            shelf.check_sample(largest + 1)
        for _ in range(20):
            while shelf.may_insert(rows):
                shelf.insert(messages.next(), now=0.0)
            assert shelf.may_sample(largest)
            shelf.sample(largest, now=0.0)


def test_a_table_that_can_never_hold_enough_says_so() -> None:
    shelf = shelf_of(min_replay_size=50, replay_max_bytes=400)
    messages = Messages(rows=2)
    fill(shelf, messages, 2)
    assert shelf.words() == "samples wait: 4 of 50 items"
    fill(shelf, messages, 20)
    size = shelf.table.size
    assert shelf.words() == shelf.shortage()
    assert shelf.words() == (
        f"samples wait for --min-replay-size 50, but "
        f"--replay-max-bytes 400 holds no more than {size} sequences"
    )
    assert shelf.table.total_bytes <= 400


@pytest.mark.parametrize("most", [1, 60])
def test_so_does_one_without_room_for_a_message_or_a_sequence(most: int) -> None:
    shelf = shelf_of(min_replay_size=1, replay_max_bytes=most)
    messages = Messages(rows=2)
    for _ in range(9):
        with contextlib.suppress(ValueError):
            shelf.insert(messages.next(), now=0.0)
    assert shelf.table.size == 0
    assert shelf.words().endswith(f"--replay-max-bytes {most} holds no more than 0 sequences")


def test_with_its_minimum_reached_a_table_full_of_bytes_is_as_free_as_any() -> None:
    shelf = shelf_of(min_replay_size=4, replay_max_bytes=400)
    fill(shelf, Messages(rows=2), 3)
    assert shelf.words() == "free"
    shelf = shelf_of(min_replay_size=4, replay_max_bytes=400, rate_limiter_error_buffer=1000)
    fill(shelf, Messages(rows=2), 20)
    assert shelf.shortage() == ""
    assert shelf.words() == "free"


@pytest.mark.parametrize("until", ["insert", "sample"])
@pytest.mark.parametrize("capacity", [30, 20, 45])
def test_a_full_shelf_goes_on_after_a_restart_with_either_side_at_its_end(until: str, capacity: int) -> None:
    settings = {"min_replay_size": 20, "replay_ratio": 0.75, "batch_size": 6}
    shelf = shelf_of(replay_capacity=30, **settings)
    messages, turns = Messages(rows=4), random.Random(2)
    shelf.admit(4)
    for restart in range(20):
        for _ in range(turns.randrange(60)):
            step(shelf, messages, turns.choice(["insert", "sample"]))
        while step(shelf, messages, until):
            pass
        before = shelf.limiter.state(), shelf.table.size, shelf.words(), shelf.largest_rows
        shelf = shelf_of(shelf.state(), seed=restart, replay_capacity=30, **settings)
        assert (shelf.limiter.state(), shelf.table.size, shelf.words(), shelf.largest_rows) == before
        assert step(shelf, messages, "sample" if until == "insert" else "insert")
    resized = shelf_of(shelf.state(), replay_capacity=capacity, **settings)
    for wish, other in turns.choices([("insert", "sample"), ("sample", "insert")], k=200):
        assert step(resized, messages, wish) or step(resized, messages, other)
    assert resized.table.size == capacity


def step(shelf: Shelf, messages: Messages, wish: str) -> bool:
    """Does what is wished, if it may be."""
    if wish == "insert":
        if not shelf.may_insert(4):
            return False
        shelf.insert(messages.next(), now=0.0)
        return True
    if not shelf.may_sample(6):
        return False
    shelf.sample(6, now=0.0)
    return True


def test_a_state_of_other_sequences_is_refused() -> None:
    shelf = shelf_of()
    fill(shelf, Messages(), 3)
    with pytest.raises(ValueError, match="chunks per item, stride and steps"):
        shelf_of(shelf.state(), burn_in=UNROLL)
    with pytest.raises(ValueError, match="no limiter's state"):
        shelf_of(shelf.state()._replace(limiter={}))
