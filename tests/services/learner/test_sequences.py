"""Sequences become a batch that is, bit for bit, the history they were cut from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.learner.sequences import SequenceBatch, Shape, staged_sequences
from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Chunk
from tests.support.learner_history import REWARD_CLIP, STACK, History, counting_spec
from tests.support.sequences import sequence

CPU = torch.device("cpu")
ROWS = 4


def staged(sequences: list[list[Chunk]], shape: Shape, weights: np.ndarray | None = None) -> SequenceBatch:
    weights = np.ones(len(sequences)) if weights is None else weights
    return staged_sequences(sequences, weights, shape, reward_clip=REWARD_CLIP, device=CPU)


def cut(
    shape: Shape, *, first: int, seed: int = 0, stack: int = STACK
) -> tuple[History, list[list[Chunk]], RunSpec]:
    """A history of `ROWS` environments, and the sequence of each that begins with chunk `first`."""
    spec = counting_spec(shape.unroll, frame_stack=stack)
    history = History.random(rows=ROWS, steps=(first + shape.chunks) * shape.unroll, seed=seed)
    numbers = range(first, first + shape.chunks)
    return history, [sequence(history, row, numbers, spec) for row in range(ROWS)], spec


@pytest.mark.parametrize(
    "shape", [Shape(4, 0, 4), Shape(4, 4, 8), Shape(4, 2, 8), Shape(5, 7, 10), Shape(1, 3, 2), Shape(8, 3, 8)]
)
@pytest.mark.parametrize("first", [0, 2])
def test_a_sequence_is_bit_for_bit_the_history_it_was_cut_from(shape: Shape, first: int) -> None:
    """Also where burn-in does not divide, so that the last chunk is used in part."""
    history, sequences, _ = cut(shape, first=first, seed=first)
    batch = staged(sequences, shape)
    start, length = first * shape.unroll, shape.steps
    steps = slice(start, start + length)
    observed = slice(start, start + length + 1)
    for name, ours, theirs in (
        ("is_first", batch.inputs.is_first, history.is_first[:, observed]),
        ("action", batch.action, history.action[:, steps]),
        ("reward", batch.reward, history.reward[:, steps].clip(-REWARD_CLIP, REWARD_CLIP)),
        ("terminated", batch.terminated, history.terminated[:, steps]),
        ("reset_steps", batch.reset_steps, history.is_first[:, start + 1 : start + length + 1]),
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.T, err_msg=name)
    stacked = batch.inputs.observation["counter"].numpy()
    assert stacked.shape == (length + 1, ROWS, STACK)
    for t in range(length + 1):
        np.testing.assert_array_equal(stacked[t], history.frames(start + t, STACK), err_msg=f"frames at {t}")
    counts = history.counts(start - 1) if start else np.zeros(ROWS)
    np.testing.assert_array_equal(batch.state[0][:, 0].numpy(), counts)


@pytest.mark.parametrize("shape", [Shape(4, 2, 8), Shape(5, 7, 10)])
def test_previous_actions_and_rewards_go_on_over_chunk_borders(shape: Shape) -> None:
    history, sequences, _ = cut(shape, first=1, seed=3)
    batch = staged(sequences, shape)
    for t in range(shape.steps + 1):
        n = shape.unroll + t
        first = history.is_first[:, n]
        reward = history.reward[:, n - 1].clip(-REWARD_CLIP, REWARD_CLIP)
        np.testing.assert_array_equal(
            batch.inputs.previous_action[t].numpy(), np.where(first, 0, history.action[:, n - 1])
        )
        np.testing.assert_array_equal(batch.inputs.previous_reward[t].numpy(), np.where(first, 0, reward))


def test_the_mean_reward_is_raw_and_of_the_trained_steps_alone() -> None:
    shape = Shape(5, 7, 10)
    history, sequences, _ = cut(shape, first=1, seed=3)
    trained = slice(5 + shape.burn_in, 5 + shape.steps)
    acted = ~history.is_first[:, trained.start + 1 : trained.stop + 1]
    assert not acted.all()
    assert history.reward[:, trained].max() > REWARD_CLIP
    expected = history.reward[:, trained][acted].mean()
    assert staged(sequences, shape).mean_reward.item() == pytest.approx(expected, rel=1e-5)


def test_frames_without_a_stack_need_no_history() -> None:
    shape = Shape(4, 2, 4)
    history, sequences, _ = cut(shape, first=1, stack=1)
    frames = staged(sequences, shape).inputs.observation["counter"]
    np.testing.assert_array_equal(frames.numpy(), history.observation[:, 4 : 4 + shape.steps + 1].T)


def test_importance_weights_stay_with_their_sequences() -> None:
    shape = Shape(4, 0, 4)
    _, sequences, _ = cut(shape, first=0)
    weights = np.array([1.0, 0.5, 0.25, 0.125])
    batch = staged(sequences, shape, weights)
    assert batch.importance_weights.dtype == torch.float32
    assert batch.importance_weights.tolist() == weights.tolist()


def test_a_sequence_of_another_length_is_refused_with_what_must_agree() -> None:
    shape = Shape(4, 2, 8)
    _, sequences, _ = cut(shape, first=0)
    sequences[1].pop()
    with pytest.raises(ChunkError, match=r"2 chunks, not 3: burn_in, sequence_length and unroll must be"):
        staged(sequences, shape)


@pytest.mark.parametrize("change", [{"number": 5}, {"stream_id": "other"}, {"first_row": 0}])
def test_a_sequence_that_is_no_run_is_refused(change: dict[str, object]) -> None:
    shape = Shape(4, 2, 8)
    _, sequences, _ = cut(shape, first=0)
    chunk = sequences[2][1]
    sequences[2][1] = replace(chunk, header=replace(chunk.header, **change))
    with pytest.raises(ChunkError, match="no run of one environment: chunk 1 is 1 rows of stream"):
        staged(sequences, shape)
