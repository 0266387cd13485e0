"""Priorities of sequences and the weights that make up for sampling by them (Horgan et al. 2018; R2D2)."""

import numpy as np
from numpy.typing import NDArray


def sequence_priorities(
    td_errors: NDArray[np.float32], valid: NDArray[np.bool_], eta: float = 0.9
) -> NDArray[np.float64]:
    """[n]: η·max|δ| + (1 − η)·mean|δ| over the `valid` steps of each of `td_errors` [n, L]; 0 without any."""
    errors = np.where(valid, np.abs(td_errors.astype(np.float64)), 0.0)
    means: NDArray[np.float64] = errors.sum(1) / np.maximum(1, valid.sum(1))
    result: NDArray[np.float64] = eta * errors.max(1) + (1 - eta) * means
    return result


def importance_weights(probabilities: NDArray[np.float64], size: int, beta: float) -> NDArray[np.float64]:
    """[n]: (1 / (N·P(i)))^β over their maximum."""
    weights = (size * probabilities) ** -beta
    result: NDArray[np.float64] = weights / weights.max()
    return result
