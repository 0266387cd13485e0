from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.replay.store import Added, ChunkRows

STEPS = 2
NO_SLOTS = np.zeros((0,), np.int64)


def data_of(stream: str, row: int, number: int) -> bytes:
    return f"{stream}/{row}/{number}".encode() * (1 + number % 3)


def add(rows: ChunkRows, stream: str, row: int, number: int, now: float = 0.0) -> Added:
    return rows.add(
        stream,
        row,
        number,
        data=data_of(stream, row, number),
        td_errors=np.full(STEPS, number, np.float32),
        valid=np.array([True, number % 2 == 0]),
        now=now,
    )


class Oracle:
    """Says by definition which items there are and which rows are needed."""

    def __init__(self, length: int, stride: int) -> None:
        self.length, self.stride = length, stride
        self.runs: dict[tuple[str, int], list[int]] = {}  # numbers of the newest run
        self.items: list[tuple[str, int, int]] = []  # stream, row, first number

    def add(self, stream: str, row: int, number: int) -> tuple[list[int], bool, bool]:
        run = self.runs.setdefault((stream, row), [number - 1])
        if number <= run[-1]:
            return [], False, True
        gap = number > run[-1] + 1
        if gap:
            run[:] = [number - 1]
        run.append(number)
        numbers = list(range(number + 1 - self.length, number + 1))
        if numbers[0] % self.stride or numbers[0] <= run[0]:
            return [], gap, False
        self.items.append((stream, row, numbers[0]))
        return numbers, gap, False

    def needed(self) -> set[tuple[str, int, int]]:
        rows = {(s, row, first + i) for s, row, first in self.items for i in range(self.length)}
        for (stream, row), run in self.runs.items():
            for first in range(run[0] + 1, run[-1] + 1):
                if first % self.stride == 0 and first + self.length - 1 > run[-1]:
                    rows |= {(stream, row, number) for number in range(first, run[-1] + 1)}
        return rows


CHUNKS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.sampled_from([1] * 12 + [0, -1, 2, 3])),
    max_size=80,
)


@given(st.integers(1, 6), st.integers(1, 6), CHUNKS, st.data())
def test_items_and_rows_are_those_that_the_definition_gives(
    length: int, stride: int, chunks: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    rows = ChunkRows(chunks_per_item=length, chunk_stride=stride, chunk_steps=STEPS)
    oracle, numbers, items = Oracle(length, stride), Counter[tuple[str, int]](), []
    for stream, row, step in chunks:
        number = numbers[stream, row] = max(numbers[stream, row] + step, 0)
        added = add(rows, stream, row, number)
        expected = oracle.add(stream, row, number)
        assert ([kept.number for kept in added.complete], added.gap, added.stale) == expected
        slots = [kept.slot for kept in added.complete]
        assert rows.read(slots) == tuple(data_of(stream, row, n) for n in expected[0])
        assert [kept.td_errors.tolist() for kept in added.complete] == [[n, n] for n in expected[0]]
        if slots:
            items.append(slots)
        if items and data.draw(st.integers(0, 3)) == 0:
            rows.release(items.pop(0))
            oracle.items.pop(0)
        needed = oracle.needed()
        assert len(rows) == len(needed)
        assert rows.bytes == sum(len(data_of(*where)) for where in needed)
        if data.draw(st.integers(0, 9)) == 0:
            rows = restored(rows, items, length, stride)
    for where, slots in zip(oracle.items, items, strict=True):
        assert rows.read(slots) == tuple(data_of(where[0], where[1], where[2] + i) for i in range(length))


def restored(rows: ChunkRows, items: list[list[int]], length: int, stride: int) -> ChunkRows:
    again = ChunkRows(chunks_per_item=length, chunk_stride=stride, chunk_steps=STEPS)
    again.restore(rows.state(), np.array(items, np.int64).reshape(-1, length))
    assert (len(again), again.bytes, again.streams) == (len(rows), rows.bytes, rows.streams)
    return again


def test_a_row_that_overlapping_items_share_is_there_once_and_goes_with_the_last() -> None:
    rows = ChunkRows(chunks_per_item=3, chunk_stride=1, chunk_steps=STEPS)
    items = [[kept.slot for kept in add(rows, "a", 0, number).complete] for number in range(5)][2:]
    assert len(rows) == 5
    assert items[0][2] == items[1][1] == items[2][0]
    rows.drop_silent(since=1.0)
    for item, left in zip(items, (4, 3, 0), strict=True):
        rows.release(item)
        assert len(rows) == left
    assert rows.bytes == 0


def test_a_stream_long_silent_is_forgotten_and_starts_anew_when_it_speaks_again() -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 0, now=1.0)
    add(rows, "b", 0, 0, now=2.0)
    add(rows, "a", 1, 0, now=3.0)
    assert rows.drop_silent(since=3.0) == 1
    assert (rows.streams, len(rows)) == (1, 2)
    assert not add(rows, "b", 0, 1, now=4.0).complete
    assert add(rows, "a", 0, 1, now=5.0).complete
    assert rows.drop_silent(since=np.inf) == 2
    with pytest.raises(ValueError, match="no stream"):
        rows.drop_most_silent()


def test_after_a_restart_a_stream_has_been_silent_since_it_was_last_heard() -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 0, now=1.0)
    add(rows, "b", 0, 0, now=5.0)
    again = restored(rows, [], 2, 1)
    assert again.drop_silent(since=5.0) == 1
    assert not add(again, "a", 0, 1, now=6.0).complete
    assert add(again, "b", 0, 1, now=6.0).complete


def test_after_a_restart_the_same_steps_of_a_row_that_waits_count() -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 1)
    complete = add(restored(rows, [], 2, 1), "a", 0, 2).complete
    assert [kept.valid.tolist() for kept in complete] == [[True, False], [True, True]]


def test_the_state_is_not_touched_by_what_comes_after() -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 0)
    state = rows.state()
    before = (list(state.rows), {name: array.copy() for name, array in state.arrays.items()})
    for number in range(1, 5):
        rows.release([kept.slot for kept in add(rows, "a", 0, number).complete])
    assert state.rows == before[0]
    assert all((array == before[1][name]).all() for name, array in state.arrays.items())


@pytest.mark.parametrize("name", ["heard", "runs", "tail", "tail_td_errors", "tail_valid"])
def test_a_state_that_is_not_whole_is_refused_in_words(name: str) -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 0)
    for wrong in (None, np.zeros((9, 9), np.complex128)):
        state = rows.state()
        state.arrays.pop(name) if wrong is None else state.arrays.update({name: wrong})  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=f"the state.*{name}"):
            ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS).restore(state, NO_SLOTS)


def test_a_state_whose_items_name_rows_it_lacks_is_refused() -> None:
    rows = ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS)
    add(rows, "a", 0, 0)
    for used in ([-1], [1], [7]):
        with pytest.raises(ValueError, match="rows that it does not hold"):
            ChunkRows(chunks_per_item=2, chunk_stride=1, chunk_steps=STEPS).restore(
                rows.state(), np.array(used)
            )


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_lengths_below_one_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ChunkRows(chunks_per_item=values[0], chunk_stride=values[1], chunk_steps=values[2])
