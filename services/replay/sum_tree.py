"""A sum tree over float64 weights, vectorized; knows nothing of what the leaves stand for."""

import numpy as np
from numpy.typing import NDArray

_FANOUT = 64  # leaves under one node


class SumTree:
    """Weights ≥ 0 of `capacity` leaves, with their sum and the leaf under any prefix of it.

    A tree of two levels: of n leaves a call looks at 64 each, and once at the running sums of capacity / 64
    nodes. In numpy that costs less than a descent through log2(capacity) levels, and the same for 1,000
    leaves as for 100,000. A node is summed anew whenever a leaf under it changes, so rounding does not
    accumulate.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a sum tree needs at least one leaf, not {capacity}")
        self.capacity = capacity
        nodes = -(-capacity // _FANOUT)
        self._leaves = np.zeros((nodes, _FANOUT))
        self._flat = self._leaves.reshape(-1)  # the same memory
        self._sums = np.zeros(nodes)
        self._running = np.zeros(nodes)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._running[-1])

    def get(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights [n] of `leaves` [n].

        Raises:
            ValueError: a leaf there is not.
        """
        weights: NDArray[np.float64] = self._flat[self._checked(leaves)]
        return weights

    def set(self, leaves: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Gives `leaves` [n] the weights `values` [n]; of a leaf named twice the last one counts.

        Raises:
            ValueError: a leaf there is not, or a weight that is negative or not finite; nothing is changed.
        """
        leaves = self._checked(leaves)
        values = np.asarray(values, np.float64)
        if values.shape != leaves.shape:
            raise ValueError(f"{leaves.shape} leaves need as many weights, not {values.shape}")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("weights must be finite and not negative")
        self._flat[leaves] = values
        nodes = leaves // _FANOUT
        self._sums[nodes] = self._leaves[nodes].sum(axis=1)
        np.cumsum(self._sums, out=self._running)

    def find(self, prefixes: NDArray[np.float64]) -> NDArray[np.int64]:
        """Leaves [n] at which the running sum of the weights first exceeds `prefixes` [n].

        Of weights so unequal that their sums round, a neighbour may be found instead. A prefix at or above
        the total is as good as one just below it. A leaf without weight is never found.

        Raises:
            ValueError: a prefix that is negative or not a number, or no leaf has a weight.
        """
        prefixes = np.asarray(prefixes, np.float64)
        if not (prefixes >= 0).all():
            raise ValueError("prefixes must not be negative")
        if self.total <= 0:
            raise ValueError("no leaf has a weight")
        # Where a running sum reaches its final value there is a weight: what rounding puts beyond goes there.
        last_node = np.searchsorted(self._running, self.total)
        nodes = np.minimum(np.searchsorted(self._running, prefixes, side="right"), last_node)
        rest = prefixes - np.where(nodes > 0, self._running[nodes - 1], 0)
        running = self._leaves[nodes].cumsum(axis=1)
        last = (running < running[:, -1:]).sum(axis=1)
        leaves: NDArray[np.int64] = nodes * _FANOUT + np.minimum((running <= rest[:, None]).sum(axis=1), last)
        return leaves

    def _checked(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        leaves = np.asarray(leaves, np.int64)
        if leaves.size and (leaves.min() < 0 or leaves.max() >= self.capacity):
            raise ValueError(f"leaves are 0 to {self.capacity - 1}")
        return leaves
