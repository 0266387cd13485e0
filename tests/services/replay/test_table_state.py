from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.replay.table import Inserted, Table

STEPS = 4
VALID = np.ones((1, STEPS), np.bool_)


def largest(td_errors: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.where(valid, td_errors, 0).max(axis=1).astype(np.float64)


ARGUMENTS: dict[str, Any] = {
    "capacity": 10,
    "max_bytes": 0,
    "priority_exponent": 0.9,
    "chunks_per_item": 2,
    "chunk_stride": 1,
    "chunk_steps": STEPS,
    "priorities": largest,
    "seed": 1,
}


def put(table: Table, number: int) -> Inserted:
    errors = np.full((1, STEPS), 1.0 + number)
    return table.insert(
        "a", 0, number, rows=[b"row %d" % number], td_errors=errors, valid=VALID, now=float(number)
    )


def filled(rows: int = 14) -> Table:
    table = Table(**ARGUMENTS)
    for number in range(rows):
        put(table, number)
    return table


def again(table: Table, **changed: Any) -> Table:
    return Table.from_state(table.state(), **{**ARGUMENTS, **changed})


def drawn(table: Table) -> dict[bytes, tuple[int, float, float]]:
    """Key, P(i) and age of each item, by its first row."""
    told = table.sample(3000, now=100.0)
    values = zip(told.keys.tolist(), told.probabilities.tolist(), told.ages.tolist(), strict=True)
    return {rows[0]: value for rows, value in zip(told.rows, values, strict=True)}


def test_a_restored_table_has_the_same_items_keys_priorities_and_goes_on_with_its_runs() -> None:
    table = filled()
    table.update(np.array([drawn(table)[b"row 9"][0]], np.uint64), np.array([77.0]))
    restored = again(table)
    assert drawn(restored) == drawn(table)
    assert (restored.size, restored.rows, restored.total_bytes) == (table.size, table.rows, table.total_bytes)
    assert (restored.inserts, restored.samples) == (13, table.samples)
    for number in (14, 15):  # the table is full
        one, other = put(table, number), put(restored, number)
        assert (one.items, one.gaps) == (other.items, other.gaps) == (1, 0)
        assert one.removed.ages.tolist() == other.removed.ages.tolist()
    assert {row: value[1:] for row, value in drawn(restored).items()} == {
        row: value[1:] for row, value in drawn(table).items()
    }


def test_how_often_an_item_was_drawn_is_known_after_a_restart() -> None:
    table = filled()
    table.sample(500, now=100.0)
    one, other = put(again(table), 14).removed, put(table, 14).removed
    assert one.uses.tolist() == other.uses.tolist()
    assert one.uses.all()


def test_a_restart_does_not_draw_the_same_again() -> None:
    table = filled()
    drawn_before = table.sample(100, now=100.0).keys.tolist()
    assert again(table).sample(100, now=100.0).keys.tolist() != drawn_before


def test_keys_given_after_the_state_was_taken_name_nothing_after_a_restart() -> None:
    table = filled()
    state = table.state()
    put(table, 14)
    lost = drawn(table)[b"row 13"][0]
    restored = Table.from_state(state, **ARGUMENTS)
    restored_again = Table.from_state(state, **ARGUMENTS)
    for either, word in ((restored, "unknown"), (restored_again, "unknown")):
        assert either.update(np.array([lost], np.uint64), np.array([5.0])) == {word: 1}
    put(restored, 14)
    put(restored_again, 14)
    assert restored.update(np.array([lost], np.uint64), np.array([5.0])) == {"evicted": 1}
    keys = {drawn(either)[b"row 13"][0] for either in (table, restored, restored_again)}
    assert len(keys) == 3


def test_restarts_never_use_the_keys_up() -> None:
    table = filled()
    state = table.state()
    state.arrays["ring"][1] = 2**31 - 1  # what some hundreds of restarts come to
    restored = Table.from_state(state, **ARGUMENTS)
    put(restored, 14)
    old, new = drawn(table), drawn(restored)
    assert {row: value[1] for row, value in new.items()} == pytest.approx(
        {row: value[1] for row, value in drawn(again(restored)).items()}
    )
    update = restored.update(np.array([key for key, _, _ in old.values()], np.uint64), np.full(10, 5.0))
    assert update.total() == 10
    keys = np.array([key for key, _, _ in new.values()], np.uint64)
    assert restored.update(keys, np.full(10, 5.0)) == {}
    assert again(restored).update(keys, np.full(10, 5.0)) == {}


@pytest.mark.parametrize("capacity", [4, 25])
def test_with_another_capacity_the_newest_items_stay_and_old_keys_name_nothing(capacity: int) -> None:
    table = filled()
    old = drawn(table)
    restored = again(table, capacity=capacity)
    kept = [b"row %d" % number for number in range(3, 13)][-capacity:]
    assert restored.size == len(kept)
    assert restored.rows == len(kept) + 1
    new = drawn(restored)
    assert set(new) == set(kept)
    update = restored.update(np.array([key for key, _, _ in old.values()], np.uint64), np.full(10, 5.0))
    assert update.total() == 10
    assert drawn(restored) == new


def test_with_another_exponent_the_same_priorities_count() -> None:
    table = again(filled(), priority_exponent=0.5)
    told = drawn(table)
    assert told[b"row 11"][1] / told[b"row 4"][1] == pytest.approx((13 / 6) ** 0.5)


def test_with_fewer_bytes_the_oldest_go() -> None:
    restored = again(filled(), max_bytes=20)
    assert restored.total_bytes <= 20
    assert set(drawn(restored)) == {b"row 11", b"row 12"}


def test_a_state_does_not_change_while_the_table_does_and_shares_its_bytes() -> None:
    table = filled()
    state = table.state()
    before = {name: array.copy() for name, array in state.arrays.items()}
    rows = list(state.rows)
    keys = np.array([key for key, _, _ in drawn(table).values()], np.uint64)
    table.update(keys, np.full(len(keys), 3.0))
    for number in range(14, 40):
        put(table, number)
    assert state.rows == rows
    assert all(np.array_equal(array, before[name]) for name, array in state.arrays.items())
    fresh = table.state()
    assert any(one is other and one for one, other in zip(fresh.rows, table.state().rows, strict=True))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"chunks_per_item": 3}, "chunks per item"),
        ({"chunk_stride": 2}, "chunks per item"),
        ({"chunk_steps": 8}, "chunks per item"),
    ],
)
def test_a_state_of_other_chunks_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        again(filled(), **changed)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("counts", None),
        ("item_rows", None),
        ("item_rows", np.full((10, 2), 10_000)),
        ("item_rows", np.full((10, 2), -1)),
        ("item_weights", np.zeros(9)),
        ("item_weights", np.full(10, np.nan)),
        ("item_weights", np.full(10, -1.0)),
        ("item_times", np.zeros(10, np.int64)),
        ("item_uses", np.zeros(10)),
        ("generations", np.zeros(3, np.int64)),
        ("generations", np.full(10, 1 << 40)),
        ("ring", np.array([10, 0])),
        ("exponent", np.array([np.nan])),
        ("heard", None),
    ],
)
def test_a_state_that_is_not_whole_is_refused_in_words(name: str, wrong: NDArray[Any] | None) -> None:
    state = filled().state()
    assert isinstance(state.arrays, dict)
    if wrong is None:
        del state.arrays[name]
    else:
        state.arrays[name] = wrong
    with pytest.raises(ValueError, match=r"state|weights|generations"):
        Table.from_state(state, **ARGUMENTS)
