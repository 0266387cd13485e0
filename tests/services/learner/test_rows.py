"""The row queue against an oracle that handles every row by itself."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.rows import Outcome, RowBatch, RowQueue
from shared.types import Chunk
from tests.support.learner_chunks import make_chunk


def rows_of(batch: RowBatch) -> list[tuple[str, int]]:
    """(stream, row of the group) of every row in `batch`."""
    return [
        (part.chunk.header.stream_id, part.chunk.header.first_row + row)
        for part in batch.slices
        for row in range(part.start, part.stop)
    ]


def chunk_of(stream: str, rows: int, *, update: int = 0) -> Chunk:
    return make_chunk(rows=rows, stream_id=stream, update=update)


def test_a_message_may_be_split_over_two_batches_and_is_finished_with_its_last_row() -> None:
    queue = RowQueue(batch_size=3, max_policy_lag=10)
    queue.add(7, chunk_of("a", 2))
    assert queue.take(0) is None
    assert queue.missing == 1
    queue.add(8, chunk_of("b", 4))
    first, second = queue.take(0), queue.take(1)
    assert first is not None
    assert second is not None
    assert rows_of(first) == [("a", 0), ("a", 1), ("b", 0)]
    assert [outcome.sequence for outcome in first.finished] == [7]
    assert rows_of(second) == [("b", 1), ("b", 2), ("b", 3)]
    assert [(o.sequence, o.reason, o.lag) for o in second.finished] == [(8, None, 1)]
    assert queue.rows == 0


def test_a_large_message_fills_several_batches() -> None:
    queue = RowQueue(batch_size=2, max_policy_lag=10)
    queue.add(1, chunk_of("a", 5))
    batches = [queue.take(0), queue.take(0)]
    assert [rows_of(batch) for batch in batches if batch] == [[("a", 0), ("a", 1)], [("a", 2), ("a", 3)]]
    assert not any(batch.finished for batch in batches if batch)
    assert queue.take(0) is None
    assert queue.missing == 1


def test_a_message_is_trained_at_the_largest_allowed_lag_and_refused_beyond_it() -> None:
    queue = RowQueue(batch_size=1, max_policy_lag=5)
    queue.add(1, chunk_of("old", 1, update=4))
    queue.add(2, chunk_of("new", 1, update=5))
    batch = queue.take(10)
    assert batch is not None
    assert rows_of(batch) == [("new", 0)]
    assert [outcome.lag for outcome in batch.finished] == [5]
    assert [(o.sequence, o.reason, o.lag) for o in queue.take_refused()] == [(1, "lag", 6)]
    assert queue.take_refused() == ()


def test_the_oldest_weights_of_a_chunk_decide_its_lag() -> None:
    queue = RowQueue(batch_size=1, max_policy_lag=5)
    chunk = chunk_of("a", 1)
    chunk.weights_update[:] = np.arange(100, 100 + chunk.unroll)
    queue.add(1, chunk)
    assert queue.take(106) is None
    assert [outcome.lag for outcome in queue.take_refused()] == [6]


def test_the_rest_of_a_message_that_became_too_old_is_refused() -> None:
    queue = RowQueue(batch_size=2, max_policy_lag=0)
    queue.add(1, chunk_of("a", 3, update=9))
    assert queue.take(9) is not None
    queue.add(2, chunk_of("b", 2, update=10))
    batch = queue.take(10)
    assert batch is not None
    assert rows_of(batch) == [("b", 0), ("b", 1)]
    assert [(o.sequence, o.reason) for o in queue.take_refused()] == [(1, "lag")]


def test_stale_messages_are_refused_while_rows_are_still_missing() -> None:
    queue = RowQueue(batch_size=8, max_policy_lag=1)
    queue.add(1, chunk_of("a", 2, update=0))
    assert queue.take(5) is None
    assert queue.missing == 8
    assert len(queue.take_refused()) == 1


def test_chunks_from_weights_that_this_learner_has_not_reached_have_no_lag() -> None:
    queue = RowQueue(batch_size=1, max_policy_lag=1)
    queue.add(1, chunk_of("a", 1, update=50))
    batch = queue.take(3)
    assert batch is not None
    assert batch.finished[0].lag == 0


def test_an_outcome_carries_the_steps_of_the_whole_message() -> None:
    queue = RowQueue(batch_size=2, max_policy_lag=1)
    chunk = chunk_of("a", 2)
    chunk.is_first[0, 2] = True
    queue.add(1, chunk)
    batch = queue.take(0)
    assert batch is not None
    assert batch.finished == (Outcome(1, None, steps=chunk.unroll * 2 - 1, lag=0),)


@settings(max_examples=200, deadline=None)
@given(
    batch_size=st.integers(1, 9),
    max_policy_lag=st.integers(0, 4),
    script=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 6), st.booleans()), max_size=30),
)
def test_every_row_is_trained_or_refused_once_and_in_order(
    batch_size: int, max_policy_lag: int, script: list[tuple[int, int, bool]]
) -> None:
    queue = RowQueue(batch_size=batch_size, max_policy_lag=max_policy_lag)
    update, outcomes, trained, sizes = 0, [], [], {}
    for sequence, (rows, weights_update, takes) in enumerate(script):
        sizes[str(sequence)] = rows
        queue.add(sequence, chunk_of(str(sequence), rows, update=weights_update))
        while takes and (batch := queue.take(update)) is not None:
            assert sum(part.stop - part.start for part in batch.slices) == batch_size
            assert all(update - part.chunk.weights_update.min() <= max_policy_lag for part in batch.slices)
            trained += rows_of(batch)
            outcomes += batch.finished
            update += 1
        outcomes += queue.take_refused()
    assert len(trained) == len(set(trained))
    assert trained == sorted(trained, key=lambda row: (int(row[0]), row[1]))
    assert max(Counter(outcome.sequence for outcome in outcomes).values(), default=0) <= 1
    trained_of = Counter(stream for stream, _ in trained)
    for outcome in outcomes:
        if outcome.reason is None:
            assert trained_of[str(outcome.sequence)] == sizes[str(outcome.sequence)]
    refused = sum(sizes[str(o.sequence)] - trained_of[str(o.sequence)] for o in outcomes if o.reason)
    assert queue.rows == sum(sizes.values()) - len(trained) - refused


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_empty_queue_has_no_batch(batch_size: int) -> None:
    queue = RowQueue(batch_size=batch_size, max_policy_lag=1)
    assert queue.take(0) is None
    assert queue.missing == batch_size
