"""From rows of decoded chunks to one training batch on the learner's device, time-major."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from services.learner.rows import Slice
from shared.networks.interface import NetworkInput, State
from shared.networks.leaves import torch_dtype
from shared.networks.unroll import clip_rewards, network_input
from shared.types import Array, Chunk

B = TypeVar("B")


class TrainingBatch(NamedTuple):
    """`T` steps of `B` rows, and the observation after the last one."""

    inputs: NetworkInput  # of T + 1 observations
    state: State  # leaves [B, …], before the first observation
    action: Tensor  # [T, B] int64
    reward: Tensor  # [T, B] float32, clipped
    terminated: Tensor  # [T, B] bool
    reset_steps: Tensor  # [T, B] bool
    behaviour_logits: Tensor  # [T, B, A] float32
    mean_reward: Tensor  # [] float32, not clipped


def rows_of(batch: TrainingBatch, rows: Tensor) -> TrainingBatch:
    """The rows `rows` [N] (indices) of `batch`, copied."""
    return TrainingBatch(
        inputs=batch.inputs.map(lambda value: value.index_select(1, rows)),
        state=tuple(leaf.index_select(0, rows) for leaf in batch.state),
        action=batch.action.index_select(1, rows),
        reward=batch.reward.index_select(1, rows),
        terminated=batch.terminated.index_select(1, rows),
        reset_steps=batch.reset_steps.index_select(1, rows),
        behaviour_logits=batch.behaviour_logits.index_select(1, rows),
        mean_reward=batch.mean_reward,
    )


def staged(slices: Sequence[Slice], *, reward_clip: float, device: torch.device) -> TrainingBatch:
    """The batch of the rows in `slices`, ready on `device` when this returns."""
    return on_own_stream(lambda: _assembled(slices, reward_clip, device), device)


def on_own_stream(assemble: Callable[[], B], device: torch.device) -> B:
    """What `assemble` puts on `device`, ready there when this returns."""
    if device.type != "cuda":
        return assemble()
    # A stream of its own lets the copies run beside the current update; waiting for it here blocks only the
    # thread that stages. An update ends with a synchronization, so no batch is freed while it is in use.
    stream = _copying_stream(device)
    with torch.cuda.stream(stream):
        batch = assemble()
    stream.synchronize()
    return batch


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: what a batch leaves free serves the next one only on the stream it was taken on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _assembled(slices: Sequence[Slice], reward_clip: float, device: torch.device) -> TrainingBatch:
    def joined(select: Callable[[Chunk], Array]) -> Tensor:
        return _joined([select(part.chunk)[part.start : part.stop] for part in slices], device)

    def leaves(field: str) -> dict[str, Tensor]:
        names = getattr(slices[0].chunk, field)
        return {name: joined(lambda chunk, at=name: getattr(chunk, field)[at]) for name in names}  # type: ignore[misc]

    action, reward = joined(lambda chunk: chunk.action), joined(lambda chunk: chunk.reward)
    inputs = network_input(
        frames=leaves("observation"),
        history=leaves("history"),
        is_first=joined(lambda chunk: chunk.is_first),
        previous_action=joined(lambda chunk: chunk.previous_action),
        previous_reward=joined(lambda chunk: chunk.previous_reward),
        action=action,
        reward=reward,
        reward_clip=reward_clip,
    )
    state_leaves = range(len(slices[0].chunk.state))
    return TrainingBatch(
        inputs=inputs,
        state=tuple(joined(lambda chunk, at=at: chunk.state[at]) for at in state_leaves),  # type: ignore[misc]
        action=time_major(action),
        reward=time_major(clip_rewards(reward, reward_clip)),
        terminated=time_major(joined(lambda chunk: chunk.terminated)),
        reset_steps=inputs.is_first[1:],
        behaviour_logits=time_major(joined(_logits)),
        mean_reward=mean_reward(reward, inputs.is_first[1:]),
    )


def _logits(chunk: Chunk) -> Array:
    assert chunk.behaviour_logits is not None  # else it was refused
    return chunk.behaviour_logits


def mean_reward(reward: Tensor, reset_steps: Tensor) -> Tensor:
    """[]: the mean of `reward` [B, T] over the steps but `reset_steps` [T, B]."""
    resets = reset_steps.t()
    return reward.masked_fill(resets, 0.0).sum() / (~resets).sum().clamp(min=1)


def time_major(batch_major: Tensor) -> Tensor:
    """[R, T, …] as [T, R, …]."""
    return batch_major.transpose(0, 1).contiguous()


def _joined(parts: Sequence[Array], device: torch.device) -> Tensor:
    """The rows of all `parts` in one tensor; the only copy on the way to it (decoded arrays are views)."""
    rows = sum(map(len, parts))
    like = parts[0]
    tensor = torch.empty(
        (rows, *like.shape[1:]), dtype=torch_dtype(like.dtype.name), pin_memory=device.type == "cuda"
    )
    np.concatenate(parts, out=tensor.numpy())
    return tensor.to(device, non_blocking=True)
