import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.replay.table import Inserted, Table

STEPS = 4
VALID = np.ones((1, STEPS), np.bool_)


def largest(td_errors: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(valid, td_errors, 0).max(axis=1).astype(np.float64)


def table_of(**changed: Any) -> Table:
    return Table(**arguments(**changed))


def arguments(**changed: Any) -> dict[str, Any]:
    defaults = {
        "capacity": 10,
        "max_bytes": 0,
        "priority_exponent": 1.0,
        "chunks_per_item": 1,
        "chunk_stride": 1,
        "chunk_steps": STEPS,
        "priorities": largest,
        "seed": 1,
    }
    return {**defaults, **changed}


def put(
    table: Table, number: int, priority: float = 1.0, data: bytes | None = None, now: float = 0.0
) -> Inserted:
    return table.insert(
        "a",
        0,
        number,
        rows=[data or f"row {number}".encode()],
        td_errors=np.full((1, STEPS), priority),
        valid=VALID,
        now=now,
    )


def keys_by_row(table: Table) -> dict[bytes, int]:
    """Keys of all items with a priority, by their first row; draws until it has them."""
    sampled = table.sample(200 * table.capacity, now=0.0)
    return {rows[0]: int(key) for key, rows in zip(sampled.keys, sampled.rows, strict=True)}


def probabilities_by_row(table: Table) -> dict[bytes, float]:
    sampled = table.sample(200 * table.capacity, now=0.0)
    return {rows[0]: float(p) for p, rows in zip(sampled.probabilities, sampled.rows, strict=True)}


def test_items_are_drawn_as_often_as_their_priorities_say() -> None:
    table = table_of(capacity=50, priority_exponent=0.7)
    priorities = np.random.default_rng(0).uniform(0.1, 5.0, 50).astype(np.float32)
    for number, priority in enumerate(priorities):
        put(table, number, float(priority))
    expected = priorities.astype(np.float64) ** 0.7
    expected /= expected.sum()
    sampled = table.sample(100_000, now=0.0)
    numbers = np.array([int(rows[0].split()[1]) for rows in sampled.rows])
    np.testing.assert_allclose(sampled.probabilities, expected[numbers], rtol=1e-6)
    counts = np.bincount(numbers, minlength=50)
    chi_square = float(((counts - 100_000 * expected) ** 2 / (100_000 * expected)).sum())
    assert 23 < chi_square < 86  # 49 degrees of freedom: 0.1 % to either side
    assert sampled.size == 50


def test_with_an_exponent_of_0_all_are_drawn_alike_and_with_priorities_of_0_too() -> None:
    for exponent, priority in ((0.0, 3.0), (0.9, 0.0)):
        table = table_of(priority_exponent=exponent)
        for number in range(4):
            put(table, number, priority if number else 0.0)
        assert probabilities_by_row(table) == dict.fromkeys([b"row %d" % n for n in range(4)], 0.25)


def test_an_item_is_its_consecutive_rows_and_its_priority_that_of_their_valid_steps() -> None:
    table = table_of(chunks_per_item=3, chunk_stride=2)
    told = []
    for number in range(6):
        errors = np.array([[1.0, -2.0, 3.0, 90.0]]) + number
        valid = np.array([[True, True, True, False]])
        rows = [b"row %d" % number]
        told.append(table.insert("a", 0, number, rows=rows, td_errors=errors, valid=valid, now=0.0).items)
    assert told == [0, 0, 1, 0, 1, 0]
    sampled = table.sample(100, now=0.0)
    items = {tuple(rows): float(p) for p, rows in zip(sampled.probabilities, sampled.rows, strict=True)}
    assert items == {
        (b"row 0", b"row 1", b"row 2"): pytest.approx(5 / 12),
        (b"row 2", b"row 3", b"row 4"): pytest.approx(7 / 12),
    }
    assert table.rows == 6


def test_a_gap_is_counted_and_never_stitched() -> None:
    table = table_of(chunks_per_item=2)
    told = [put(table, number) for number in (0, 2, 3, 3, 1, 4)]
    assert [inserted.items for inserted in told] == [0, 0, 1, 0, 0, 1]
    assert [inserted.gaps for inserted in told] == [0, 1, 0, 0, 0, 0]
    assert [inserted.stale for inserted in told] == [0, 0, 0, 1, 1, 0]
    assert {tuple(rows) for rows in table.sample(50, now=0.0).rows} == {
        (b"row 2", b"row 3"),
        (b"row 3", b"row 4"),
    }


def test_the_oldest_make_room_and_their_age_and_uses_are_told() -> None:
    table = table_of(capacity=3)
    for number in range(3):
        assert not put(table, number, now=10.0 + number).removed.ages.size
    uses = Counter(rows[0] for rows in table.sample(30, now=20.0).rows)
    removed = put(table, 3, now=20.0).removed
    assert (removed.ages.tolist(), removed.uses.tolist()) == ([10.0], [uses[b"row 0"]])
    sampled = table.sample(60, now=20.0)
    ages = {rows[0]: float(age) for age, rows in zip(sampled.ages, sampled.rows, strict=True)}
    assert ages == {b"row 1": 9.0, b"row 2": 8.0, b"row 3": 0.0}
    assert (table.size, table.rows, table.inserts, table.samples) == (3, 3, 4, 90)


def test_an_update_for_an_item_that_is_gone_changes_nothing() -> None:
    table = table_of(capacity=3)
    for number in range(3):
        put(table, number)
    late = keys_by_row(table)
    put(table, 3)
    before = probabilities_by_row(table)
    assert table.update(np.array([late[b"row 0"]], np.uint64), np.array([50.0])) == {"evicted": 1}
    assert probabilities_by_row(table) == before
    assert keys_by_row(table)[b"row 3"] == late[b"row 0"] + (1 << 32)  # the same slot, a generation on


def test_nor_does_one_for_an_item_whose_slot_is_still_free() -> None:
    table = table_of(max_bytes=100)
    put(table, 0, data=b"x" * 60)
    late = keys_by_row(table)[b"x" * 60]
    put(table, 1, data=b"y" * 60)
    assert table.update(np.array([late], np.uint64), np.array([50.0])) == {"evicted": 1}
    assert probabilities_by_row(table) == {b"y" * 60: 1.0}


def test_what_is_wrong_in_an_update_is_counted_by_reason_and_the_rest_is_in_force() -> None:
    table = table_of(capacity=3)
    for number in range(4):
        put(table, number)
    keys = keys_by_row(table)
    good, other = keys[b"row 1"], keys[b"row 2"]
    refused = table.update(
        np.array([good, other, good, good, good, good, 3, 9 << 32, 1 << 32, good], np.uint64),
        np.array([9.0, np.nan, np.inf, -1.0, -0.5, 1e39, 1.0, 1.0, 1.0, 2.0]),
    )
    assert refused == {"not_finite": 2, "negative": 2, "too_large": 1, "unknown": 2, "evicted": 1}
    weights = probabilities_by_row(table)
    assert weights[b"row 1"] / weights[b"row 2"] == pytest.approx(2.0)


def test_new_priorities_count_to_the_same_exponent_as_the_first_ones() -> None:
    table = table_of(priority_exponent=0.5)
    for number, priority in enumerate((1.0, 9.0)):
        put(table, number, priority)
    weights = probabilities_by_row(table)
    assert weights[b"row 1"] / weights[b"row 0"] == pytest.approx(3.0)
    table.update(np.array([keys_by_row(table)[b"row 0"]], np.uint64), np.array([144.0]))
    weights = probabilities_by_row(table)
    assert weights[b"row 0"] / weights[b"row 1"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("keys", "priorities"),
    [
        (np.zeros((1, 1), np.uint64), np.zeros((1, 1))),
        (np.zeros(2, np.uint64), np.zeros(1)),
        (np.zeros(1, np.int64), np.zeros(1)),
        (np.zeros(1, np.uint64), np.array(["a"])),
    ],
)
def test_an_update_of_another_shape_or_type_is_refused(keys: Any, priorities: Any) -> None:
    with pytest.raises(ValueError, match="keys"):
        table_of().update(keys, priorities)


def test_bytes_are_bounded_by_removing_the_oldest_and_then_what_waits() -> None:
    table = table_of(max_bytes=100, capacity=1000)
    for number in range(30):
        put(table, number, data=bytes([number + 1]) * 30)
        assert table.total_bytes <= 100
    assert set(keys_by_row(table)) == {bytes([number + 1]) * 30 for number in (27, 28, 29)}
    with pytest.raises(ValueError, match="101 bytes"):
        put(table, 30, data=b"x" * 101)
    waiting = table_of(max_bytes=100, chunks_per_item=5)
    for stream in range(9):
        waiting.insert(
            f"s{stream}", 0, 0, rows=[b"x" * 30], td_errors=np.zeros((1, STEPS)), valid=VALID, now=0.0
        )
    assert (waiting.total_bytes, waiting.streams, waiting.size) == (90, 3, 0)


def test_items_that_are_larger_than_the_table_are_let_go_and_smaller_ones_still_come() -> None:
    table = table_of(max_bytes=500, chunks_per_item=2)
    for number in range(4):
        assert put(table, number, data=b"x" * 300).items == 0
    assert (table.size, table.inserts) == (0, 0)
    assert table.total_bytes <= 500
    for number in range(4, 8):
        inserted = put(table, number, data=b"x" * 100)
    assert (inserted.items, table.size) == (1, 3)
    assert table.total_bytes == 400


def test_the_bytes_of_an_item_that_is_gone_are_let_go() -> None:
    table, data = table_of(max_bytes=100), bytes(range(60))
    before = sys.getrefcount(data)
    put(table, 0, data=data)
    assert sys.getrefcount(data) > before
    sampled = table.sample(3, now=0.0)
    put(table, 1, data=b"z" * 60)
    assert sampled.rows == [(data,)] * 3  # who has them keeps them
    del sampled
    assert sys.getrefcount(data) == before
    assert table.total_bytes == 60


def test_a_message_of_more_rows_than_the_table_has_places_leaves_its_last_rows() -> None:
    table = table_of(capacity=3)
    rows = [b"row %d" % row for row in range(8)]
    inserted = table.insert(
        "a", 0, 0, rows=rows, td_errors=np.ones((8, STEPS)), valid=np.ones((8, STEPS), np.bool_), now=0.0
    )
    assert (inserted.items, len(inserted.removed.ages), table.size, table.rows) == (8, 5, 3, 3)
    assert set(keys_by_row(table)) == {b"row 5", b"row 6", b"row 7"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"number": -1}, "negative"),
        ({"first_row": -1}, "negative"),
        ({"rows": [b""]}, "empty"),
        ({"rows": [b"a", b"b"]}, "td_errors and valid"),
        ({"valid": np.ones((1, STEPS))}, "td_errors and valid"),
        ({"td_errors": np.full((1, STEPS), np.nan)}, "finite"),
        ({"td_errors": np.full((1, STEPS), 1e300)}, "finite"),
    ],
)
def test_rows_that_no_chunk_has_are_refused_and_change_nothing(changed: dict[str, Any], words: str) -> None:
    table = table_of()
    good = {"first_row": 0, "number": 0, "rows": [b"a"], "td_errors": np.ones((1, STEPS)), "valid": VALID}
    with pytest.raises(ValueError, match=words):
        table.insert("a", **{**good, **changed}, now=0.0)
    assert (table.size, table.rows, table.streams) == (0, 0, 0)


def test_an_empty_table_has_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="1 items cannot be drawn of 0"):
        table_of().sample(1, now=0.0)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 60), st.data())
def test_the_table_is_that_of_a_plain_list(
    length: int, stride: int, capacity: int, max_bytes: int, data: st.DataObject
) -> None:
    max_bytes = max_bytes and max_bytes + 40
    table = table_of(
        capacity=capacity, chunks_per_item=length, chunk_stride=stride, max_bytes=max_bytes, seed=3
    )
    items: dict[tuple[bytes, ...], float] = {}  # priority by rows, the oldest first
    history: list[tuple[bytes, float]] = []
    for number in range(data.draw(st.integers(1, 25))):
        row = bytes([number + 1]) * data.draw(st.integers(1, 5))
        history.append((row, data.draw(st.sampled_from([0.5, 1.0, 4.0]))))
        inserted = put(table, number, history[-1][1], row)
        if inserted.items:
            items[tuple(row for row, _ in history[-length:])] = max(p for _, p in history[-length:])
        for _ in inserted.removed.ages:
            items.pop(next(iter(items)))
        assert table.size == len(items) <= capacity
        assert not max_bytes or table.total_bytes <= max_bytes
        if items:
            table = data.draw(st.sampled_from([table, again(table, capacity, max_bytes, length, stride)]))
            check(table, items, data)


def check(table: Table, items: dict[tuple[bytes, ...], float], data: st.DataObject) -> None:
    sampled = table.sample(64, now=0.0)
    total = sum(items.values())
    for rows, probability in zip(sampled.rows, sampled.probabilities, strict=True):
        assert probability == pytest.approx(items[tuple(rows)] / total)
    priorities = np.array([data.draw(st.sampled_from([0.5, 3.0])) for _ in range(2)])
    assert not table.update(sampled.keys[:2], priorities)
    for rows, priority in zip(sampled.rows[:2], priorities, strict=True):
        items[tuple(rows)] = priority


def again(table: Table, capacity: int, max_bytes: int, length: int, stride: int) -> Table:
    changed = {"capacity": capacity, "max_bytes": max_bytes, "seed": 3}
    return Table.from_state(
        table.state(), **arguments(**changed, chunks_per_item=length, chunk_stride=stride)
    )
