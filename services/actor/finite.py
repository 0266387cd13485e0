"""Numbers that are not finite, which no policy can be trained on; knows no space and no stream."""

import numpy as np

from shared.types import Array

_MOST = float(np.finfo(np.float32).max)  # rewards travel as float32, and networks compute in it
_MOST_SQUARED = _MOST**2


class NotFinite(Exception):
    """An environment gave NaN or an infinity; it counts as crashed."""


def check_finite(name: str, values: Array) -> None:
    """Raises NotFinite where not all floats of `values` […] are finite, in their own type and as float32."""
    if float(np.vdot(values, values)) <= _MOST_SQUARED:  # quicker; also false where only the sum is too much
        return
    fits = np.abs(values) <= _MOST if values.itemsize > 4 else np.isfinite(values)
    if not fits.all():
        value = values[~fits].flat[0]
        kind = "float32" if np.isfinite(value) else values.dtype.name
        raise NotFinite(f"{name} is not finite as {kind}: {value}")


def check_reward(reward: float) -> None:
    """Raises NotFinite where one environment's reward is not finite."""
    if not -_MOST <= reward <= _MOST:
        raise NotFinite(f"reward is not finite as float32: {reward:g}")
