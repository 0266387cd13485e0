"""R2D2's TD errors by definition: a walk over plain floats from every step on."""

import math
from collections.abc import Sequence


def h(x: float, epsilon: float = 1e-3) -> float:
    """The rescaling."""
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x


def h_inverse(x: float, epsilon: float = 1e-3) -> float:
    """Its inverse."""
    root = math.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon))
    return math.copysign(((root - 1) / (2 * epsilon)) ** 2 - 1, x)


def td_errors(
    *,
    online_q: Sequence[Sequence[float]],
    target_q: Sequence[Sequence[float]],
    actions: Sequence[int],
    rewards: Sequence[float],
    discounts: Sequence[float],
    reset_steps: Sequence[bool],
    n: int,
    epsilon: float = 1e-3,
) -> list[float]:
    """Of one environment: Q-values of T + 1 observations, all else of T steps."""
    steps = len(rewards)

    def value(time: int) -> float:
        """What x_time is worth: chosen online, valued by the target network."""
        best = max(range(len(online_q[time])), key=online_q[time].__getitem__)
        return h_inverse(target_q[time][best], epsilon)

    errors = []
    for t in range(steps):
        total, product, time = 0.0, 1.0, t
        while time < min(t + n, steps) and not reset_steps[time]:
            total += product * rewards[time]
            product *= discounts[time]
            time += 1
        target = h(total + product * value(time), epsilon)
        errors.append(0.0 if reset_steps[t] else target - online_q[t][actions[t]])
    return errors
