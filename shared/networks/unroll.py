"""From newest frames, actions and rewards to a network's inputs.

Inference (T' = 1), the learner (T' = T + 1) and `load_policy` all build their inputs here, so that acting
and training cannot differ. Arguments are batch-major, as chunks are; results time-major, as networks are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.networks.interface import NetworkInput

# torch can zero few elements of its younger unsigned types only as signed ones.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def network_input(
    *,
    frames: Mapping[str, Tensor],
    history: Mapping[str, Tensor],
    is_first: Tensor,
    previous_action: Tensor,
    previous_reward: Tensor,
    action: Tensor | None = None,
    reward: Tensor | None = None,
    reward_clip: float,
) -> NetworkInput:
    """Inputs of an unroll over T' observations.

    Args:
        frames: leaf name -> [B, T', …], newest frames only.
        history: leaf name -> [B, S − 1, …], the frames before the first; empty when S = 1.
        is_first: [B, T'] bool.
        previous_action: [B] int64, before the first observation.
        previous_reward: [B] float32, raw, before the first observation.
        action: [B, T' − 1] int64, taken after each observation but the last; None when T' = 1.
        reward: [B, T' − 1] float32, raw, what followed `action`.
        reward_clip: rewards are clipped to ± this; 0: not clipped.
    """
    previous_actions, previous_rewards = previous_inputs(
        previous_action=previous_action,
        previous_reward=previous_reward,
        action=action,
        reward=reward,
        is_first=is_first,
        reward_clip=reward_clip,
    )
    return NetworkInput(
        observation={name: stack_frames(history.get(name), leaf, is_first) for name, leaf in frames.items()},
        previous_action=previous_actions,
        previous_reward=previous_rewards,
        is_first=is_first.t().contiguous(),
    )


def stack_frames(history: Tensor | None, frames: Tensor, is_first: Tensor) -> Tensor:
    """Stacks every frame with the S − 1 before it, oldest first; those before its episode are zeros.

    Args:
        history: [B, S − 1, …], the frames before `frames` as the policy saw them; None when S = 1.
        frames: [B, T', …].
        is_first: [B, T'] bool.

    Returns:
        [T', B, S, …]; [T', B, …] when S = 1.
    """
    batch, steps, *shape = frames.shape
    if history is None or history.shape[1] == 0:
        return frames.transpose(0, 1).contiguous()
    stack = history.shape[1] + 1
    sequence = torch.cat([history, frames], dim=1)  # index j holds the frame of time j − (S − 1)
    if steps == 1:
        stacked = sequence.unsqueeze(0)
    else:
        windows = sequence.unfold(1, stack, 1).movedim(-1, 2).transpose(0, 1)
        stacked = torch.empty((steps, batch, stack, *shape), dtype=frames.dtype, device=frames.device)
        stacked.copy_(windows)
    if not is_first.is_cuda and not is_first.any():  # most often so; on a GPU, asking costs more than doing
        return stacked
    before = _before_episode(is_first, stack)
    plain = stacked.view(SIGNED.get(stacked.dtype, stacked.dtype))
    if plain.is_cuda:
        plain.masked_fill_(before.view(*before.shape, *[1] * len(shape)), 0)
    else:  # few frames; a mask over all of them would pass over every byte, 15 times slower
        plain.flatten(0, 2).index_fill_(0, before.flatten().nonzero().squeeze(1), 0)
    return stacked


def next_history(stacked: Tensor) -> Tensor:
    """[B, S − 1, …], the history for the next step, of the last step's stacked frames [B, S, …]."""
    return stacked[:, 1:]


def clip_rewards(rewards: Tensor, reward_clip: float) -> Tensor:
    """`rewards` clipped to ± `reward_clip`; as they are when it is 0."""
    return rewards.clamp(-reward_clip, reward_clip) if reward_clip else rewards


def previous_inputs(
    *,
    previous_action: Tensor,
    previous_reward: Tensor,
    is_first: Tensor,
    reward_clip: float,
    action: Tensor | None = None,
    reward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Previous action [T', B] and clipped previous reward [T', B] of every observation, 0 where `is_first`.

    Arguments as those of `network_input`.
    """
    actions = previous_action.unsqueeze(0)
    rewards = previous_reward.unsqueeze(0)
    if action is not None and reward is not None:
        actions = torch.cat([actions, action.t()])
        rewards = torch.cat([rewards, reward.t()])
    first = is_first.t()
    if actions.shape != first.shape or rewards.shape != first.shape:
        raise ValueError(
            f"is_first is {list(is_first.shape)}: one action and reward are needed before the first "
            f"observation and between any two, not {list(actions.t().shape)} and {list(rewards.t().shape)}"
        )
    rewards = clip_rewards(rewards, reward_clip).masked_fill(first, 0)
    return actions.masked_fill(first, 0), rewards


def _before_episode(is_first: Tensor, stack: int) -> Tensor:
    """[T', B, S] bool: the frame s places from the oldest at time t is from before t's episode."""
    steps = is_first.shape[1]
    times = torch.arange(steps, device=is_first.device)
    starts = torch.where(is_first, times, -stack).cummax(dim=1).values  # [B, T'], of the episode at t
    ages = torch.arange(stack - 1, -1, -1, device=is_first.device)
    frame_times = times.unsqueeze(1) - ages  # [T', S]
    return frame_times.unsqueeze(1) < starts.t().unsqueeze(2)
