"""The V-trace actor-critic loss; pure tensors, no network and no configuration."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.algorithms.vtrace import vtrace_targets


class LossInputs(NamedTuple):
    """What one batch says, and what the network says of it."""

    policy_logits: Tensor  # [T, B, A], with gradient
    baseline: Tensor  # [T, B], with gradient
    bootstrap_value: Tensor  # [B], V of the observation after the last step
    behaviour_logits: Tensor  # [T, B, A]
    action: Tensor  # [T, B] int64
    reward: Tensor  # [T, B], clipped and scaled where the run does
    terminated: Tensor  # [T, B] bool
    reset_steps: Tensor  # [T, B] bool: the action was ignored


class LossTerms(NamedTuple):
    """Scalars; the first four after the reduction and with their costs, the rest over the valid steps."""

    total_loss: Tensor  # with gradient, as the other losses
    policy_loss: Tensor
    baseline_loss: Tensor
    entropy_loss: Tensor  # −entropy_cost · entropy, summed or averaged
    entropy: Tensor  # mean, in nats
    value: Tensor  # mean of V
    target: Tensor  # mean of vs
    rho: Tensor  # mean importance weight, not truncated


def vtrace_loss(
    inputs: LossInputs,
    *,
    discount: float,
    lambda_: float,
    max_rho: float,
    max_pg_rho: float,
    baseline_cost: float,
    entropy_cost: float,
    reduction: Literal["sum", "mean"],
    normalize_advantages: bool = False,
    policy_clip: float = 0.0,
) -> LossTerms:
    """−Σ log π(a)·adv + ½·baseline_cost·Σ(vs − V)² − entropy_cost·ΣH(π) over all steps but reset steps.

    `mean` divides all of it by the number of those steps. A discount is 0 where the episode terminated. A
    reset step has log ρ = −∞, so that nothing before it sees what comes after it. Nothing flows through
    vs and adv (IMPALA, arXiv 1802.01561, section 4.2). `normalize_advantages`: adv minus its mean, over its
    deviation, both of those steps (as PPO's implementations do). `policy_clip`, unless it is 0: a step has no
    policy gradient where ρ is already farther than that from 1 on the side its advantage pushes it to (the
    clip of PPO, arXiv 1707.06347, equation 7).
    """
    valid = ~inputs.reset_steps
    count = valid.sum().clamp(min=1)
    log_policy = inputs.policy_logits.float().log_softmax(dim=-1)
    log_prob = _of_action(log_policy, inputs.action)
    log_rhos = log_prob.detach() - _of_action(inputs.behaviour_logits.float().log_softmax(-1), inputs.action)
    baseline = inputs.baseline.float()
    targets = vtrace_targets(
        log_rhos=log_rhos.masked_fill(inputs.reset_steps, -torch.inf),
        discounts=discount * (~inputs.terminated).float(),
        rewards=inputs.reward,
        values=baseline.detach(),
        bootstrap_value=inputs.bootstrap_value.detach().float(),
        lambda_=lambda_,
        max_rho=max_rho,
        max_pg_rho=max_pg_rho,
    )

    advantages = targets.advantages
    if normalize_advantages:
        advantages = _normalized(advantages, valid)
    if policy_clip:
        pushed_away = (log_rhos.exp() - 1.0) * advantages.sign()
        advantages = advantages.masked_fill(pushed_away > policy_clip, 0.0)

    def total(x: Tensor) -> Tensor:
        return x.masked_fill(inputs.reset_steps, 0.0).sum()

    entropy = total(-(log_policy.exp() * log_policy).sum(-1))
    divisor = count if reduction == "mean" else 1
    policy = -total(log_prob * advantages) / divisor
    value = 0.5 * baseline_cost * total((targets.values - baseline).square()) / divisor
    bonus = -entropy_cost * entropy / divisor
    return LossTerms(
        total_loss=policy + value + bonus,
        policy_loss=policy,
        baseline_loss=value,
        entropy_loss=bonus,
        entropy=entropy.detach() / count,
        value=total(baseline.detach()) / count,
        target=total(targets.values) / count,
        rho=total(log_rhos.exp()) / count,
    )


def _normalized(advantages: Tensor, valid: Tensor) -> Tensor:
    """`advantages` with mean 0 and deviation 1 over the steps that are `valid`."""
    count = valid.sum().clamp(min=1)  # not advantages[valid], for whose size a GPU would be waited for
    centred = advantages - advantages.masked_fill(~valid, 0).sum() / count
    deviation = (centred.square().masked_fill(~valid, 0).sum() / count).sqrt()
    return centred / (deviation + 1e-8)


def _of_action(log_policy: Tensor, action: Tensor) -> Tensor:
    """[T, B]: the log probability of each action."""
    return log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
