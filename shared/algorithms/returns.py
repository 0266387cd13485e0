"""n-step double Q-learning in rescaled space (Kapturowski et al. 2019, section 2.3). Tensors in, tensors out.

Q-values live in rescaled space: a target is the n-step return of what their inverse stands for, rescaled.
"""

import torch
from torch import Tensor


def rescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h(x) = sign(x)(√(|x| + 1) − 1) + εx, elementwise (Pohlen et al. 2018, arXiv 1805.11593).

    √(|x| + 1) − 1 is computed as |x|/(√(|x| + 1) + 1), in which nothing cancels.
    """
    return x / ((x.abs() + 1).sqrt() + 1) + epsilon * x


def unrescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h⁻¹(x) = sign(x)(((√(1 + 4ε(|x| + 1 + ε)) − 1)/(2ε))² − 1), elementwise.

    With s the root, the square is that of 1 + v, where v = 2|x|(1 − 2ε/(s + 1 + 2ε))/(1 + s). As it stands
    above, float32 would be wrong by 1e-4 near 0, where s − 1 and the square − 1 cancel.
    """
    root = (1 + 4 * epsilon * (x.abs() + 1 + epsilon)).sqrt()
    v = 2 * x * (1 - 2 * epsilon / (root + 1 + 2 * epsilon)) / (1 + root)
    return v * (v.abs() + 2)


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
    """Targets of `T` steps in rescaled space, without gradient.

    With a*(x) = argmax Q_online(x) and V(x) = h⁻¹(Q_target(x, a*(x)))::

        y_t = h(r_t + γ_t (r_{t+1} + γ_{t+1} (… (r_{t+m−1} + γ_{t+m−1} V(x_{t+m})))))),   m = min(n, T − t)

    Args:
        online_q: [T + 1, B, A] Q_online of the observations before each step and after the last one.
        target_q: [T + 1, B, A] Q_target of the same.
        rewards: [T, B] r_t, what followed the action.
        discounts: [T, B] γ_t: 0 where the episode terminated after step t. Where it was truncated, γ stays.
        n: rewards in a sum, at least 1.
        epsilon: ε of the rescaling.
        reset_steps: [T, B] bool: the step's action was ignored, x_{t+1} belongs to another episode. Every sum
            that reaches such a step ends with V(x_t); what follows it does not pass.

    Returns:
        [T, B] y; at a reset step Q_target(x_t, a*), which is no target and must be masked out.

    Raises:
        ValueError: an input has another shape than `rewards` implies, or `n` is below 1.
    """
    _check(rewards, n, online_q=online_q, target_q=target_q, discounts=discounts, reset_steps=reset_steps)
    values = unrescale(_of_actions(target_q, online_q.argmax(-1)), epsilon)
    if reset_steps is not None:
        rewards = torch.where(reset_steps, values[:-1], rewards)
        discounts = discounts.masked_fill(reset_steps, 0.0)
    steps = len(rewards)
    last = torch.arange(n, steps + n, device=values.device).clamp(max=steps)
    returns = values[last].to(torch.result_type(values, rewards))
    for k in reversed(range(min(n, steps))):  # the k-th reward, for the steps that have one
        returns[: steps - k] = torch.addcmul(rewards[k:], discounts[k:], returns[: steps - k])
    return rescale(returns, epsilon)


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
    """TD errors δ_t = y_t − Q_online(x_t, a_t) in rescaled space, 0 at reset steps; without gradient.

    `actions` [T, B] int64 are a_t; `double_q_targets` says what y and all other arguments are. Returns
    [T, B]. Raises ValueError as it does.
    """
    targets = double_q_targets(
        online_q=online_q,
        target_q=target_q,
        rewards=rewards,
        discounts=discounts,
        n=n,
        epsilon=epsilon,
        reset_steps=reset_steps,
    )
    if actions.shape != rewards.shape:
        raise ValueError(f"actions must be {list(rewards.shape)} as rewards is, not {list(actions.shape)}")
    errors = targets - _of_actions(online_q[:-1], actions)
    return errors if reset_steps is None else errors.masked_fill(reset_steps, 0.0)


def _of_actions(q_values: Tensor, actions: Tensor) -> Tensor:
    return q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def _check(rewards: Tensor, n: int, *, online_q: Tensor, target_q: Tensor, **others: Tensor | None) -> None:
    shape = tuple(rewards.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"rewards must be [T, B] with at least one step, not {list(shape)}")
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    for name, tensor in others.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} as rewards is, not {list(tensor.shape)}")
    lead = (shape[0] + 1, shape[1])
    if online_q.dim() != 3 or tuple(online_q.shape[:2]) != lead:
        raise ValueError(f"online_q must be [{lead[0]}, {lead[1]}, A], not {list(online_q.shape)}")
    if target_q.shape != online_q.shape:
        raise ValueError(
            f"target_q must be {list(online_q.shape)} as online_q is, not {list(target_q.shape)}"
        )
