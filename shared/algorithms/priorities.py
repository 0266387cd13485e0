"""Priorities of sequences, and the weights that make up for sampling by them. Arrays in, arrays out."""

import numpy as np
from numpy.typing import NDArray


def sequence_priorities(
    td_errors: NDArray[np.floating], valid: NDArray[np.bool_], eta: float = 0.9
) -> NDArray[np.float64]:
    """Priority η·max|δ| + (1 − η)·mean|δ| of each sequence (Kapturowski et al. 2019, section 2.3).

    Args:
        td_errors: [n, L], of L ≥ 1 steps each.
        valid: [n, L]: the steps that count, which reset steps do not.
        eta: η.

    Returns:
        [n]; 0 for a sequence without a step that counts.

    Raises:
        ValueError: the shapes differ or are not [n, L].
    """
    if td_errors.ndim != 2 or td_errors.shape != valid.shape or not td_errors.shape[1]:
        raise ValueError(f"td_errors and valid must be [n, L], not {td_errors.shape} and {valid.shape}")
    errors = np.where(valid, np.abs(td_errors), 0).astype(np.float64)
    means = errors.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)
    priorities: NDArray[np.float64] = eta * errors.max(axis=1) + (1 - eta) * means
    return priorities


def importance_weights(probabilities: NDArray[np.floating], size: int, beta: float) -> NDArray[np.float64]:
    """Weights w_i = (1/(N·P(i)))^β over their maximum (Schaul et al. 2016, arXiv 1511.05952, section 3.4).

    Args:
        probabilities: [n] P(i) > 0, with which each was sampled.
        size: N, items there were.
        beta: β; 1 makes up for the sampling in full, 0 gives weights of 1.

    Returns:
        [n], the largest 1.
    """
    weights = (size * np.asarray(probabilities, np.float64)) ** -beta
    normalized: NDArray[np.float64] = weights / weights.max(initial=0.0)
    return normalized
