import dataclasses

import numpy as np
import pytest

from tests.support.chunks import make_chunk, make_run_spec


def test_a_chunk_knows_its_rows_and_steps() -> None:
    chunk = make_chunk(make_run_spec(unroll=5), rows=3)
    assert (chunk.rows, chunk.unroll) == (3, 5)


def test_a_step_is_a_reset_step_where_the_next_observation_starts_an_episode() -> None:
    chunk = make_chunk(make_run_spec(unroll=3), rows=2)
    is_first = np.array([[True, False, True, False], [False, False, False, True]])
    chunk = dataclasses.replace(chunk, is_first=is_first)
    assert chunk.reset_steps.tolist() == [[False, True, False], [False, False, True]]


def test_reset_steps_are_no_steps() -> None:
    chunk = make_chunk(make_run_spec(unroll=3), rows=2)
    is_first = np.array([[True, False, True, False], [False, False, False, True]])
    assert dataclasses.replace(chunk, is_first=is_first).steps == 4


def test_a_chunk_cannot_be_reassigned() -> None:
    chunk = make_chunk(make_run_spec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        chunk.reward = chunk.reward  # type: ignore[misc]
