"""Which chunks the learner takes."""

from dataclasses import replace

import numpy as np
import pytest

from services.learner.intake import check_chunk
from shared.errors import ChunkError
from shared.types import Chunk
from shared.wire.chunks import decode_chunk, encode_chunk
from tests.support.learner_chunks import make_chunk, make_spec

SPEC = make_spec(unroll=4, actions=3, frame_stack=2)
STATE = ((5,), (5,))


def chunk_with(**changes: object) -> Chunk:
    state = tuple(np.zeros((2, 5), np.float32) for _ in STATE)
    return replace(make_chunk(spec=SPEC, rows=2, state=state), **changes)  # type: ignore[arg-type]


def test_a_chunk_of_this_run_passes() -> None:
    check_chunk(decode_chunk(encode_chunk(chunk_with())), SPEC, STATE, run_id="test")


def test_a_chunk_without_frame_stack_and_state_passes() -> None:
    spec = make_spec()
    check_chunk(make_chunk(spec=spec), spec, (), run_id="test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"header": replace(chunk_with().header, network_hash="0" * 16)}, "its network is '0000"),
        ({"header": replace(chunk_with().header, run_id="other")}, "run 'other'"),
        ({"action": np.full((2, 4), 3)}, "action is not within 0 … 2"),
        ({"previous_action": np.full(2, -1)}, "previous_action is not within 0 … 2"),
        ({"behaviour_logits": np.zeros((2, 4, 4), np.float32)}, "logits of 4 actions, the run has 3"),
        ({"observation": {"observation": np.zeros((2, 5, 3), np.float64)}}, "its observation is .*float64"),
        ({"observation": {"other": np.zeros((2, 5, 3), np.float32)}}, "its observation is other"),
        ({"history": {}}, "its history is absent"),
        ({"state": ()}, "its recurrent state"),
        ({"state": (np.zeros((2, 5), "f4"), np.full((2, 5), np.inf, "f4"))}, "its state is not finite"),
        ({"behaviour_logits": np.full((2, 4, 3), np.nan, "f4")}, "its behaviour_logits is not finite"),
        ({"reward": np.full((2, 4), -np.inf, "f4")}, "its reward is not finite"),
        ({"state": (np.zeros((2, 5)), np.zeros((2, 5)))}, "its recurrent state"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_in_words(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ChunkError, match=words):
        check_chunk(chunk_with(**changes), SPEC, STATE, run_id="test")


def test_a_chunk_of_another_unroll_is_refused_in_words() -> None:
    other = make_chunk(spec=make_spec(unroll=5, actions=3, frame_stack=2))
    fitting = replace(other, header=chunk_with().header)
    with pytest.raises(ChunkError, match="it has 5 steps, the run's unroll is 4"):
        check_chunk(fitting, SPEC, STATE, run_id="test")


def test_a_history_where_the_run_stacks_no_frames_is_refused() -> None:
    spec = make_spec()
    chunk = replace(make_chunk(spec=spec), history={"observation": np.zeros((2, 1, 3), np.float32)})
    with pytest.raises(ChunkError, match="its history is"):
        check_chunk(chunk, spec, (), run_id="test")
