"""How often Q-learning's environments act at random instead of greedily."""

import numpy as np
from numpy.typing import NDArray

EVALUATION_EPSILON = 0.001
"""ε wherever R2D2 is judged (Kapturowski et al. 2019); not 0, so that no policy loops for ever."""

_BASE, _SPREAD = 0.4, 7.0


def epsilon_ladder(count: int) -> NDArray[np.float32]:
    """[count] ε_j = 0.4^(1 + 7j/(count − 1)) of a group's environments; 0.4 for a single one.

    The ladder of Ape-X (Horgan et al. 2018, arXiv 1803.00933, section 4.1), which there spans all actors and
    here each group: groups come and go, and none of them needs to know of the others.
    """
    exponents = 1 + _SPREAD * np.arange(count) / max(count - 1, 1)
    ladder: NDArray[np.float32] = (_BASE**exponents).astype(np.float32)
    return ladder
