"""V-trace targets (Espeholt et al. 2018, arXiv 1802.01561, section 4.1). Tensors in, tensors out."""

from typing import NamedTuple

import torch
from torch import Tensor


class VTraceTargets(NamedTuple):
    """Both without gradient."""

    values: Tensor  # [T, B], vs
    advantages: Tensor  # [T, B], of the policy gradient, already weighted with min(ρ̄_pg, ρ)


@torch.no_grad()
def vtrace_targets(
    *,
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    lambda_: float = 1.0,
    max_rho: float = 1.0,
    max_pg_rho: float = 1.0,
) -> VTraceTargets:
    """Value targets and policy-gradient advantages of `T` steps.

    With ρ_t = π(a_t|x_t)/μ(a_t|x_t), ρ̂_t = min(ρ̄, ρ_t) and c_t = λ min(1, ρ_t)::

        δ_t          = ρ̂_t (r_t + γ_t V(x_{t+1}) − V(x_t))
        vs_t − V(x_t) = δ_t + γ_t c_t (vs_{t+1} − V(x_{t+1})),   backwards from vs_T = V(x_T)
        advantage_t  = min(ρ̄_pg, ρ_t) (r_t + γ_t vs_{t+1} − V(x_t))

    Args:
        log_rhos: [T, B] log ρ_t. A reset step (its action was ignored) has −inf: its target is V(x_t) and
            nothing passes through it; its advantage is 0. It must be masked out of every loss too.
        discounts: [T, B] γ_t: 0 where the episode terminated after step t. Where it was truncated, γ stays.
        rewards: [T, B] r_t, what followed the action.
        values: [T, B] V(x_t).
        bootstrap_value: [B] V(x_T).
        lambda_: λ.
        max_rho: ρ̄ of the value targets.
        max_pg_rho: ρ̄_pg of the advantages.

    Returns:
        Targets in the widest dtype of the inputs.

    Raises:
        ValueError: an input has another shape than `log_rhos` implies; it is named.
    """
    _check_shapes(log_rhos, bootstrap_value, discounts=discounts, rewards=rewards, values=values)
    rhos = log_rhos.exp()
    next_values = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])
    deltas = rhos.clamp(max=max_rho) * (rewards + discounts * next_values - values)
    decays = discounts * rhos.clamp(max=1.0) * lambda_

    # vs_t − V(x_t) in place of δ_t; the last step's is δ itself, since vs_T − V(x_T) = 0.
    errors = list(deltas.unbind())
    for t, decay in reversed(list(enumerate(decays.unbind()[:-1]))):
        errors[t] = torch.addcmul(errors[t], decay, errors[t + 1])
    targets = values + torch.stack(errors)

    next_targets = torch.cat([targets[1:], bootstrap_value.unsqueeze(0)])
    advantages = rhos.clamp(max=max_pg_rho) * (rewards + discounts * next_targets - values)
    return VTraceTargets(values=targets, advantages=advantages)


def _check_shapes(log_rhos: Tensor, bootstrap_value: Tensor, **others: Tensor) -> None:
    shape = tuple(log_rhos.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"log_rhos must be [T, B] with at least one step, not {list(shape)}")
    for name, tensor in others.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} as log_rhos is, not {list(tensor.shape)}")
    if tuple(bootstrap_value.shape) != shape[1:]:
        raise ValueError(f"bootstrap_value must be {list(shape[1:])}, not {list(bootstrap_value.shape)}")
