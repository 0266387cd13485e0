"""n-step double Q-learning in rescaled space (R2D2, Kapturowski et al. 2019). Tensors in, tensors out."""

import torch
from torch import Tensor


def rescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h(x) = sign(x)(√(|x| + 1) − 1) + εx."""
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + epsilon * x


def unrescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h⁻¹(x)."""
    root = (1 + 4 * epsilon * (x.abs() + 1 + epsilon)).sqrt()
    return x.sign() * (((root - 1) / (2 * epsilon)).square() - 1)


@torch.no_grad()
def double_q_targets(
    *,
    online_q: Tensor,
    target_q: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    n: int,
    epsilon: float = 1e-3,
    reset_steps: Tensor | None = None,
) -> Tensor:
    """[T, B]: y, the targets in rescaled space; `online_q`, `target_q` [T + 1, B, A], the rest [T, B]."""
    values = target_q.gather(-1, online_q.argmax(-1, keepdim=True)).squeeze(-1)
    values = unrescale(values, epsilon)
    resets = torch.zeros_like(rewards, dtype=torch.bool) if reset_steps is None else reset_steps
    rewards, discounts = torch.where(resets, values[:-1], rewards), discounts.masked_fill(resets, 0.0)
    steps = len(rewards)
    targets = values[(torch.arange(steps, device=values.device) + n).clamp(max=steps)]
    for k in reversed(range(min(n, steps))):  # past the end: reward 0, discount 1
        nothing = rewards.new_zeros(k, *rewards.shape[1:])
        targets = torch.cat([rewards[k:], nothing]) + torch.cat([discounts[k:], nothing + 1]) * targets
    return rescale(targets, epsilon)


@torch.no_grad()
def double_q_td_errors(
    *,
    online_q: Tensor,
    target_q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    n: int,
    epsilon: float = 1e-3,
    reset_steps: Tensor | None = None,
) -> Tensor:
    """[T, B]: target minus online in rescaled space, 0 at reset steps."""
    targets = double_q_targets(
        online_q=online_q,
        target_q=target_q,
        rewards=rewards,
        discounts=discounts,
        n=n,
        epsilon=epsilon,
        reset_steps=reset_steps,
    )
    chosen = online_q[:-1].gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    errors = targets - chosen
    return errors if reset_steps is None else errors.masked_fill(reset_steps, 0.0)
