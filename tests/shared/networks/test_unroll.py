from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.networks.unroll import clip_rewards, network_input, next_history, previous_inputs, stack_frames
from shared.wire.limits import DTYPES


class OneEnvironment:
    """The oracle: sees one environment step by step, as one would write it for a single environment."""

    def __init__(self, stack: int, shape: tuple[int, ...]) -> None:
        self._stack = stack
        self._nothing = torch.zeros(shape, dtype=torch.int64)
        self._frames: list[Tensor] = []

    def observe(self, frame: Tensor, is_first: bool) -> Tensor:
        """[S, …] (or […] when S = 1): the newest frames of this episode, zeros before it."""
        if is_first:
            self._frames = []
        self._frames.append(frame)
        newest = self._frames[-self._stack :]
        padded = [self._nothing] * (self._stack - len(newest)) + newest
        return torch.stack(padded) if self._stack > 1 else frame


def make_run(steps: int, batch: int, shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    """A long run of `batch` environments with random episode ends, every value different."""
    generator = torch.Generator().manual_seed(seed)
    is_first = torch.rand(batch, steps, generator=generator) < 0.3
    is_first[:, 0] = True
    size = batch * steps * int(torch.tensor(shape).prod()) if shape else batch * steps
    return {
        "frames": torch.arange(1, size + 1).reshape(batch, steps, *shape),
        "is_first": is_first,
        "action": torch.randint(1, 9, (batch, steps), generator=generator),
        "reward": torch.randn(batch, steps, generator=generator) * 3 + 10,
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("stack", [1, 2, 4])
def test_stacking_in_pieces_of_any_length_equals_watching_each_environment(
    stack: int, data: st.DataObject
) -> None:
    steps, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    shape = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    run = make_run(steps, batch, shape, data.draw(st.integers(0, 10_000)))
    oracles = [OneEnvironment(stack, shape) for _ in range(batch)]

    history = torch.zeros(batch, stack - 1, *shape, dtype=torch.int64) if stack > 1 else None
    start = 0
    while start < steps:
        stop = min(steps, start + data.draw(st.integers(1, 5)))
        stacked = stack_frames(history, run["frames"][:, start:stop], run["is_first"][:, start:stop])
        for t in range(start, stop):
            for b, oracle in enumerate(oracles):
                expected = oracle.observe(run["frames"][b, t], bool(run["is_first"][b, t]))
                assert torch.equal(stacked[t - start, b], expected), (t, b)
        history = next_history(stacked[-1]) if stack > 1 else None
        start = stop


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_learners_unroll_holds_what_inference_saw_step_by_step(data: st.DataObject) -> None:
    stack, clip = data.draw(st.sampled_from([1, 4])), data.draw(st.sampled_from([0.0, 10.0]))
    steps, batch = data.draw(st.integers(2, 14)), data.draw(st.integers(1, 3))
    run = make_run(steps, batch, (2,), data.draw(st.integers(0, 10_000)))

    seen, histories = [], []
    history = {"x": torch.zeros(batch, stack - 1, 2, dtype=torch.int64)} if stack > 1 else {}
    action, reward = torch.full((batch,), 77), torch.full((batch,), 77.0)  # of a stream before its first step
    previous = []
    for t in range(steps):
        histories.append(history)
        previous.append((action, reward))
        inputs = network_input(
            frames={"x": run["frames"][:, t : t + 1]},
            history=history,
            is_first=run["is_first"][:, t : t + 1],
            previous_action=action,
            previous_reward=reward,
            reward_clip=clip,
        )
        seen.append(inputs)
        if stack > 1:
            history = {"x": next_history(inputs.observation["x"][0])}
        action, reward = run["action"][:, t], run["reward"][:, t]

    start = data.draw(st.integers(0, steps - 1))
    stop = data.draw(st.integers(start + 1, steps))
    unroll = network_input(
        frames={"x": run["frames"][:, start:stop]},
        history=histories[start],
        is_first=run["is_first"][:, start:stop],
        previous_action=previous[start][0],
        previous_reward=previous[start][1],
        action=run["action"][:, start : stop - 1],
        reward=run["reward"][:, start : stop - 1],
        reward_clip=clip,
    )
    for t in range(start, stop):
        torch.testing.assert_close(unroll.observation["x"][t - start], seen[t].observation["x"][0])
        for field in ("previous_action", "previous_reward", "is_first"):
            ours, theirs = getattr(unroll, field)[t - start], getattr(seen[t], field)[0]
            assert torch.equal(ours, theirs), (field, t)


def test_the_previous_action_and_reward_are_those_of_the_step_before_within_the_episode() -> None:
    actions, rewards = previous_inputs(
        previous_action=torch.tensor([7, 0]),
        previous_reward=torch.tensor([5.0, 0.0]),
        action=torch.tensor([[1, 2, 3], [4, 5, 6]]),
        reward=torch.tensor([[0.5, -9.0, 1.0], [9.0, 0.25, 2.0]]),
        is_first=torch.tensor([[False, False, True, False], [True, False, False, True]]),
        reward_clip=1.0,
    )
    assert actions.t().tolist() == [[7, 1, 0, 3], [0, 4, 5, 0]]
    assert rewards.t().tolist() == [[1.0, 0.5, 0.0, 1.0], [0.0, 1.0, 0.25, 0.0]]
    assert (actions.dtype, rewards.dtype) == (torch.int64, torch.float32)


def test_an_action_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="one action and reward"):
        previous_inputs(
            previous_action=torch.zeros(2, dtype=torch.int64),
            previous_reward=torch.zeros(2),
            action=torch.zeros(2, 3, dtype=torch.int64),
            reward=torch.zeros(2, 3),
            is_first=torch.zeros(2, 3, dtype=torch.bool),
            reward_clip=0.0,
        )


def test_rewards_are_clipped_only_where_the_run_says_so() -> None:
    rewards = torch.tensor([-3.0, 0.5, 2.0])
    assert clip_rewards(rewards, 1.0).tolist() == [-1.0, 0.5, 1.0]
    assert clip_rewards(rewards, 0.0).tolist() == [-3.0, 0.5, 2.0]


@pytest.mark.parametrize("stack", [1, 4])
def test_stacked_frames_keep_their_dtype_and_are_contiguous(stack: int) -> None:
    history = torch.ones(3, stack - 1, 5, 6, dtype=torch.uint8) if stack > 1 else None
    frames = torch.ones(3, 2, 5, 6, dtype=torch.uint8)
    stacked = stack_frames(history, frames, torch.zeros(3, 2, dtype=torch.bool))
    assert stacked.dtype == torch.uint8
    assert stacked.is_contiguous()
    assert stacked.shape == ((2, 3, 4, 5, 6) if stack > 1 else (2, 3, 5, 6))


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("name", DTYPES)
def test_frames_of_every_dtype_that_travels_can_be_stacked(name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    history, frames = torch.ones(1, 2, *shape).to(dtype), torch.ones(1, 3, *shape).to(dtype)
    stacked = stack_frames(history, frames, torch.tensor([[False, True, False]]))
    assert stacked.dtype == dtype
    seen = stacked.float().reshape(3, 3, -1)[:, :, 0]
    assert seen.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
