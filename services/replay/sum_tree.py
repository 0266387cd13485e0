"""A sum tree over float64 weights, vectorized; knows nothing of what the leaves stand for."""

import numpy as np
from numpy.typing import NDArray


class SumTree:
    """Weights ≥ 0 of `capacity` leaves, with their sum and the leaf under any prefix of it.

    Every inner node is the sum of its two children, computed anew whenever one of them changes, so
    rounding does not accumulate. A call costs O(n log capacity), in log capacity numpy operations.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a sum tree needs at least one leaf, not {capacity}")
        self.capacity = capacity
        self._levels = (capacity - 1).bit_length()
        self._first_leaf = 1 << self._levels
        self._nodes = np.zeros(2 * self._first_leaf)  # 1 is the root; the children of i are 2i and 2i + 1

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._nodes[1])

    def get(self, leaves: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights [n] of `leaves` [n].

        Raises:
            ValueError: a leaf there is not.
        """
        weights: NDArray[np.float64] = self._nodes[self._nodes_of(leaves)]
        return weights

    def set(self, leaves: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Gives `leaves` [n] the weights `values` [n]; of a leaf named twice the last one counts.

        Raises:
            ValueError: a leaf there is not, or a weight that is negative or not finite; nothing is changed.
        """
        nodes = self._nodes_of(leaves)
        values = np.asarray(values, np.float64)
        if values.shape != nodes.shape:
            raise ValueError(f"{nodes.shape} leaves need as many weights, not {values.shape}")
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("weights must be finite and not negative")
        self._nodes[nodes] = values
        for _ in range(self._levels):
            nodes = nodes >> 1
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, prefixes: NDArray[np.float64]) -> NDArray[np.int64]:
        """Leaves [n] at which the running sum of the weights first exceeds `prefixes` [n].

        Of weights so unequal that their sums round, a neighbour may be found instead. A prefix at or above
        the total is as good as one just below it. A leaf without weight is never found.

        Raises:
            ValueError: a prefix that is negative or not a number, or no leaf has a weight.
        """
        rest = np.array(prefixes, np.float64)
        if not (rest >= 0).all():
            raise ValueError("prefixes must not be negative")
        if self.total <= 0:
            raise ValueError("no leaf has a weight")
        nodes = np.ones(rest.shape, np.int64)
        for _ in range(self._levels):
            nodes *= 2
            left = self._nodes[nodes]
            # A sum above 0 has a child above 0, so this descent never enters an empty half.
            right = (rest >= left) & (self._nodes[nodes + 1] > 0)
            rest -= np.where(right, left, 0)
            nodes += right
        return nodes - self._first_leaf

    def _nodes_of(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        leaves = np.asarray(leaves, np.int64)
        if leaves.size and (leaves.min() < 0 or leaves.max() >= self.capacity):
            raise ValueError(f"leaves are 0 to {self.capacity - 1}")
        return leaves + self._first_leaf
