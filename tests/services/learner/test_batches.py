"""Batches against the uncut history they come from."""

import numpy as np
import pytest
import torch

from services.learner.batches import mean_reward, staged
from services.learner.rows import Slice
from shared.specs import LeafSpec
from shared.wire.chunks import decode_chunk, encode_chunk
from tests.support.learner_chunks import make_chunk, make_spec
from tests.support.learner_history import REWARD_CLIP, STACK, CountingNetwork, History, counting_spec

CPU = torch.device("cpu")
UNROLL, ROWS, CHUNKS = 5, 6, 8


@pytest.fixture
def history() -> History:
    return History.random(rows=ROWS, steps=UNROLL * CHUNKS, seed=3)


@pytest.mark.parametrize("stack", [1, STACK])
@pytest.mark.parametrize("number", range(CHUNKS))
def test_every_input_of_the_network_is_the_one_at_its_time(history: History, number: int, stack: int) -> None:
    spec = counting_spec(UNROLL, frame_stack=stack)
    batch = staged([Slice(history.chunk(number, spec), 0, ROWS)], reward_clip=REWARD_CLIP, device=CPU)
    frames = batch.inputs.observation["counter"]
    for t in range(UNROLL + 1):
        n = number * UNROLL + t
        expected = history.frames(n, stack)
        torch.testing.assert_close(frames[t], torch.from_numpy(expected if stack > 1 else expected[:, 0]))
        np.testing.assert_array_equal(batch.inputs.is_first[t], history.is_first[:, n])
        first = history.is_first[:, n] | (n == 0)
        np.testing.assert_array_equal(
            batch.inputs.previous_action[t], np.where(first, 0, history.action[:, max(0, n - 1)])
        )


@pytest.mark.parametrize("number", range(CHUNKS))
def test_a_counting_network_sees_the_same_in_chunks_as_in_the_uncut_history(
    history: History, number: int
) -> None:
    spec = counting_spec(UNROLL)
    batch = staged([Slice(history.chunk(number, spec), 0, ROWS)], reward_clip=REWARD_CLIP, device=CPU)
    output, _ = CountingNetwork()(batch.inputs, batch.state)
    for t in range(UNROLL + 1):
        expected = torch.from_numpy(history.value(number * UNROLL + t, STACK))
        torch.testing.assert_close(output.baseline[t].detach(), expected)


def test_what_follows_an_action_stands_at_the_actions_time(history: History) -> None:
    batch = staged([Slice(history.chunk(2, counting_spec(UNROLL)), 0, ROWS)], reward_clip=0.5, device=CPU)
    for t in range(UNROLL):
        n = 2 * UNROLL + t
        np.testing.assert_array_equal(batch.action[t], history.action[:, n])
        np.testing.assert_array_equal(batch.reward[t], history.reward[:, n].clip(-0.5, 0.5))
        np.testing.assert_array_equal(batch.terminated[t], history.terminated[:, n])
        np.testing.assert_array_equal(batch.reset_steps[t], history.is_first[:, n + 1])
        np.testing.assert_array_equal(batch.behaviour_logits[t], history.logits[:, n])


def test_rewards_are_raw_where_the_run_does_not_clip(history: History) -> None:
    chunk = history.chunk(1, counting_spec(UNROLL))
    batch = staged([Slice(chunk, 0, ROWS)], reward_clip=0.0, device=CPU)
    np.testing.assert_array_equal(batch.reward.T, chunk.reward)


def test_the_mean_reward_is_raw_and_without_reset_steps(history: History) -> None:
    chunk = history.chunk(2, counting_spec(UNROLL))
    batch = staged([Slice(chunk, 0, 4), Slice(chunk, 4, ROWS)], reward_clip=0.1, device=CPU)
    steps = slice(2 * UNROLL, 3 * UNROLL)
    acted = ~history.is_first[:, 2 * UNROLL + 1 : 3 * UNROLL + 1]
    assert not acted.all()
    assert batch.mean_reward.item() == pytest.approx(history.reward[:, steps][acted].mean(), rel=1e-5)


def test_the_mean_reward_of_reset_steps_alone_is_zero() -> None:
    assert mean_reward(torch.ones(1, 2), torch.ones(2, 1, dtype=torch.bool)).item() == 0.0


def test_rows_of_several_messages_stand_beside_each_other() -> None:
    spec = make_spec(unroll=3, frame_stack=2)
    chunks = [
        decode_chunk(
            encode_chunk(make_chunk(spec=spec, rows=4, seed=seed, state=(np.full((4, 2), seed, np.float32),)))
        )
        for seed in range(3)
    ]
    slices = [Slice(chunks[0], 3, 4), Slice(chunks[1], 0, 4), Slice(chunks[2], 0, 2)]
    batch = staged(slices, reward_clip=0.0, device=CPU)
    assert batch.action.shape == (3, 7)
    assert batch.inputs.observation["observation"].shape == (4, 7, 2, 3)
    np.testing.assert_array_equal(batch.state[0][:, 0], [0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(batch.action[:, 0], chunks[0].action[3])
    np.testing.assert_array_equal(batch.action[:, 1:5].T, chunks[1].action)
    np.testing.assert_array_equal(batch.behaviour_logits[:, 6], chunks[2].behaviour_logits[1])


def test_a_batch_does_not_share_memory_with_the_message() -> None:
    data = encode_chunk(make_chunk(rows=2))
    chunk = decode_chunk(data)
    batch = staged([Slice(chunk, 0, 2)], reward_clip=0.0, device=CPU)
    before = chunk.reward.copy()
    batch.reward.fill_(7.0)
    np.testing.assert_array_equal(chunk.reward, before)


def test_images_keep_their_dtype() -> None:
    image = LeafSpec(name="image", dtype="uint8", shape=(4, 4, 1), low=(0.0,), high=(255.0,))
    spec = make_spec(observation=(image,))
    batch = staged([Slice(make_chunk(spec=spec), 0, 2)], reward_clip=0.0, device=CPU)
    assert batch.inputs.observation["image"].dtype == torch.uint8
