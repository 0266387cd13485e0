"""Numbers that are not finite, which no policy can be trained on; knows no space and no stream."""

import math

import numpy as np

from shared.types import Array

_MOST = float(np.finfo(np.float32).max)  # of a reward, which travels as float32


class NotFinite(Exception):
    """An environment gave NaN or an infinity; it counts as crashed."""


def check_finite(name: str, values: Array) -> None:
    """Raises NotFinite where not all floats of `values` […] are finite."""
    if math.isfinite(np.vdot(values, values)):  # quicker, and no answer only where squares overflow
        return
    finite = np.isfinite(values)
    if not finite.all():
        raise NotFinite(f"{name} is not finite as {values.dtype.name}: {values[~finite].flat[0]}")


def check_reward(reward: float) -> None:
    """Raises NotFinite where one environment's reward is not finite."""
    if not -_MOST <= reward <= _MOST:
        raise NotFinite(f"reward is not finite as float32: {reward:g}")
