"""From replay's sequences to one training batch on the learner's device, time-major; knows no NATS."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.learner.batches import mean_reward, on_own_stream, time_major
from shared.errors import ChunkError
from shared.networks.interface import NetworkInput, State
from shared.networks.leaves import torch_dtype
from shared.networks.unroll import clip_rewards, network_input
from shared.types import Array, Chunk


class SequenceBatch(NamedTuple):
    """`L` steps of `B` sequences (burn-in first), and the observation after the last one."""

    inputs: NetworkInput  # of L + 1 observations
    state: State  # leaves [B, …], stored: before the first burn-in step
    action: Tensor  # [L, B] int64
    reward: Tensor  # [L, B] float32, clipped as the run says
    terminated: Tensor  # [L, B] bool
    reset_steps: Tensor  # [L, B] bool
    importance_weights: Tensor  # [B] float32
    mean_reward: Tensor  # [] float32, of the steps after burn-in, not clipped


class Shape(NamedTuple):
    """What a run's sequences look like, in steps."""

    unroll: int  # T, of a chunk
    burn_in: int
    trained: int  # after burn-in

    @property
    def steps(self) -> int:
        """L, burn-in included."""
        return self.burn_in + self.trained

    @property
    def chunks(self) -> int:
        """Chunks that L steps and the observation after them lie in; the last may be used in part."""
        return -(-self.steps // self.unroll)

    def used(self, number: int) -> int:
        """Steps used of the sequence's chunk `number`."""
        return min(self.unroll, self.steps - number * self.unroll)


def check_run(chunks: Sequence[Chunk], shape: Shape) -> None:
    """Raises ChunkError, in words, unless `chunks` are as many as needed, in order, of one environment."""
    if len(chunks) != shape.chunks:
        raise ChunkError(
            f"replay's sequence has {len(chunks)} chunks, not {shape.chunks}: burn_in, sequence_length and "
            f"unroll must be the same for replay and learner"
        )
    first = chunks[0].header
    for number, chunk in enumerate(chunks):
        header = chunk.header
        place = header.stream_id, header.first_row, header.number
        if place != (first.stream_id, first.first_row, first.number + number) or chunk.rows != 1:
            raise ChunkError(
                f"replay's sequence is no run of one environment: chunk {number} is {chunk.rows} rows of "
                f"stream {header.stream_id}, row {header.first_row}, number {header.number}"
            )


def staged_sequences(
    sequences: Sequence[Sequence[Chunk]],
    importance_weights: NDArray[np.float64],
    shape: Shape,
    *,
    reward_clip: float,
    device: torch.device,
) -> SequenceBatch:
    """The batch of `sequences`, each the chunks of its run in order, ready on `device` when this returns.

    Raises ChunkError when one is no such run.
    """
    for chunks in sequences:
        check_run(chunks, shape)
    return on_own_stream(
        lambda: _assembled(sequences, importance_weights, shape, reward_clip, device), device
    )


def _assembled(
    sequences: Sequence[Sequence[Chunk]],
    importance_weights: NDArray[np.float64],
    shape: Shape,
    reward_clip: float,
    device: torch.device,
) -> SequenceBatch:
    firsts = [chunks[0] for chunks in sequences]

    def first(select: Callable[[Chunk], Array]) -> Tensor:
        return _sent(np.concatenate([select(chunk) for chunk in firsts]), device)

    def steps(select: Callable[[Chunk], Array], after: int = 0) -> Tensor:
        return _joined(sequences, select, shape, after=after, device=device)

    def leaf(field: str, name: str) -> Callable[[Chunk], Array]:
        return lambda chunk: getattr(chunk, field)[name]

    def state(number: int) -> Callable[[Chunk], Array]:
        return lambda chunk: chunk.state[number]

    action, reward = steps(lambda chunk: chunk.action), steps(lambda chunk: chunk.reward)
    inputs = network_input(
        frames={name: steps(leaf("observation", name), after=1) for name in firsts[0].observation},
        history={name: first(leaf("history", name)) for name in firsts[0].history},
        is_first=steps(lambda chunk: chunk.is_first, after=1),
        previous_action=first(lambda chunk: chunk.previous_action),
        previous_reward=first(lambda chunk: chunk.previous_reward),
        action=action,
        reward=reward,
        reward_clip=reward_clip,
    )
    return SequenceBatch(
        inputs=inputs,
        state=tuple(first(state(number)) for number in range(len(firsts[0].state))),
        action=time_major(action),
        reward=time_major(clip_rewards(reward, reward_clip)),
        terminated=time_major(steps(lambda chunk: chunk.terminated)),
        reset_steps=inputs.is_first[1:],
        importance_weights=_sent(importance_weights.astype(np.float32), device),
        mean_reward=mean_reward(reward[:, shape.burn_in :], inputs.is_first[1 + shape.burn_in :]),
    )


def _joined(
    sequences: Sequence[Sequence[Chunk]],
    select: Callable[[Chunk], Array],
    shape: Shape,
    *,
    after: int,
    device: torch.device,
) -> Tensor:
    """[B, L + after, …]: a field of every sequence across the borders of its chunks.

    `after` is 1 for what chunks hold of T + 1 observations: row T is then also row 0 of the next chunk.
    """
    like = select(sequences[0][0])
    tensor = torch.empty(
        (len(sequences), shape.steps + after, *like.shape[2:]),
        dtype=torch_dtype(like.dtype.name),
        pin_memory=device.type == "cuda",
    )
    joined = tensor.numpy()
    for row, chunks in enumerate(sequences):
        for number, chunk in enumerate(chunks):
            start, used = number * shape.unroll, shape.used(number) + after
            joined[row, start : start + used] = select(chunk)[0, :used]
    return tensor.to(device, non_blocking=True)


def _sent(array: Array, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
