"""Finished episodes of one group, from the rewards and flags that actors send."""

from dataclasses import dataclass

import numpy as np

from shared.types import Array


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One finished episode of one environment of a group."""

    row: int
    episode_return: float  # sum of raw rewards
    length: int  # environment steps; reset steps are none
    weights_version: int  # of its last action


class EpisodeCounter:
    """Sums raw rewards per row from `is_first` to the next `is_first`.

    Only `is_first` ends an episode: `terminated` alone may be a lost life. An episode whose last step before
    `is_first` was neither terminated nor truncated was cut off by a crash: it does not count.
    """

    def __init__(self, group_size: int) -> None:
        self._returns = np.zeros(group_size, dtype=np.float64)
        self._lengths = np.zeros(group_size, dtype=np.int64)
        self._ended = np.zeros(group_size, dtype=np.bool_)  # the last step was terminated or truncated
        self._weights_version = 0  # chose the actions of the last step

    def observe(
        self, *, reward: Array, terminated: Array, truncated: Array, is_first: Array, weights_version: int
    ) -> list[Episode]:
        """Takes what followed the last actions, chosen by `weights_version`; all arrays [B].

        Returns the episodes that ended: those whose row `is_first` now.
        """
        begins = np.count_nonzero(is_first) > 0
        finished = self._finish(np.flatnonzero(is_first)) if begins else []
        self._weights_version = weights_version
        self._returns += np.where(is_first, 0.0, reward) if begins else reward
        self._lengths += ~is_first if begins else 1
        self._ended = terminated | truncated
        return finished

    def _finish(self, rows: Array) -> list[Episode]:
        finished = [
            Episode(
                row=int(row),
                episode_return=float(self._returns[row]),
                length=int(self._lengths[row]),
                weights_version=self._weights_version,
            )
            for row in rows
            if self._ended[row]
        ]
        self._returns[rows] = 0.0
        self._lengths[rows] = 0
        return finished
