"""R2D2's TD errors of a chunk, from which replay makes its first priorities. Knows no stream."""

from dataclasses import replace

import torch
from torch import Tensor

from services.inference.assembler import Cut
from shared.algorithms.returns import double_q_td_errors
from shared.networks.unroll import clip_rewards
from shared.specs import RunSpec
from shared.types import Array, Chunk


def completed(cut: Cut, spec: RunSpec) -> Chunk:
    """The chunk of `cut`, for R2D2 with its TD errors: the acting network is online and target network.

    Where the weights changed within the chunk, each Q-value is of those that acted. Targets near the chunk's
    end sum fewer than n rewards, since nothing after row T is known yet.
    """
    if cut.q_values is None:
        return cut.chunk
    chunk = cut.chunk
    q_values = _time_major(cut.q_values)
    errors = double_q_td_errors(
        online_q=q_values,
        target_q=q_values,
        actions=_time_major(chunk.action),
        rewards=clip_rewards(_time_major(chunk.reward), spec.reward_clip),
        discounts=spec.discount * (~_time_major(chunk.terminated)).float(),
        n=spec.n_steps,
        reset_steps=_time_major(chunk.reset_steps),
    )
    return replace(chunk, td_errors=errors.t().contiguous().numpy())


def _time_major(array: Array) -> Tensor:
    return torch.from_numpy(array).transpose(0, 1)
