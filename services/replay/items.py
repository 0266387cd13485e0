"""Items in a ring of slots with their keys, priorities, ages and uses; knows rows only by number.

Slots are reused in turn; a slot's generation grows with every item in it, so the key of an item that is gone
names nothing.
"""

from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.replay.state import TableState
from services.replay.sum_tree import SumTree

# unknown: no item has had that key; evicted: the item is gone; too_large: above what float32 holds.
Refusal = Literal["not_finite", "negative", "too_large", "unknown", "evicted"]

_SLOTS = np.uint64(0xFFFFFFFF)
_GENERATION_BITS = np.uint64(32)
_LARGEST = float(np.finfo(np.float32).max)


class Removed(NamedTuple):
    """Items removed, the oldest first."""

    ages: NDArray[np.float64]  # [n], seconds
    uses: NDArray[np.int64]  # [n], how often each was sampled


class Items:
    """At most `capacity` items in the order in which they came, drawn with P(i) = p_i^α / Σ p^α."""

    def __init__(self, *, capacity: int, length: int, exponent: float) -> None:
        """Starts empty.

        Args:
            capacity: items at most.
            length: rows of an item.
            exponent: α.

        Raises:
            ValueError: a value that cannot be.
        """
        if not 1 <= capacity <= int(_SLOTS):
            raise ValueError(f"capacity must be 1 to {int(_SLOTS)}, not {capacity}")
        if not 0 <= exponent <= 1:
            raise ValueError(f"priority_exponent must be 0 to 1, not {exponent}")
        self.capacity, self.length = capacity, length
        self.size = 0
        self._exponent = exponent
        self._tree = SumTree(capacity)
        self._rows = np.zeros((capacity, length), np.int64)
        self._generations = np.zeros(capacity, np.int64)  # 0: never used
        self._floor = 0  # no generation up to it is given again
        self._times = np.zeros(capacity)
        self._uses = np.zeros(capacity, np.int64)
        self._first = 0  # slot of the oldest item

    def rows(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [n, length] of the items at `slots`."""
        return self._rows[slots]

    def slot_by_age(self, nth: int) -> int:
        """Slot of the item before which `nth` others came."""
        return (self._first + nth) % self.capacity

    def oldest(self, n: int) -> NDArray[np.int64]:
        """Slots of the n oldest items."""
        return (self._first + np.arange(n)) % self.capacity

    def append(
        self, rows: list[list[int]], priorities: NDArray[np.floating], now: float
    ) -> NDArray[np.int64]:
        """Adds n items of rows [n][length] and priorities [n] and returns their slots [n].

        The caller sees to it that they fit.
        """
        slots = (self._first + self.size + np.arange(len(rows))) % self.capacity
        self._tree.set(slots, self._weights(priorities))
        self._rows[slots] = rows
        self._generations[slots] = np.maximum(self._generations[slots], self._floor) + 1
        self._times[slots], self._uses[slots] = now, 0
        self.size += len(rows)
        return slots

    def remove_oldest(self, n: int, now: float) -> Removed:
        """Removes the n oldest items."""
        slots = self.oldest(n)
        self._tree.set(slots, np.zeros(n))
        self._first = (self._first + n) % self.capacity
        self.size -= n
        return Removed(now - self._times[slots], self._uses[slots])

    def draw(self, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draws n items independently, with replacement; counts the use of each.

        Returns:
            Their slots [n] and P(i) [n]. Items that all have priority 0 are drawn alike.
        """
        if self._tree.total > 0:
            slots = self._tree.find(rng.random(n) * self._tree.total)
            probabilities = self._tree.get(slots) / self._tree.total
        else:
            slots = (self._first + rng.integers(0, self.size, n)) % self.capacity
            probabilities = np.full(n, 1 / self.size)
        np.add.at(self._uses, slots, 1)
        return slots, probabilities

    def ages(self, slots: NDArray[np.int64], now: float) -> NDArray[np.float64]:
        """Seconds [n] since each was inserted."""
        ages: NDArray[np.float64] = now - self._times[slots]
        return ages

    def uses(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often [n] each was drawn."""
        return self._uses[slots]

    def keys(self, slots: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Keys [n]: generation << 32 | slot."""
        return self._generations[slots].astype(np.uint64) << _GENERATION_BITS | slots.astype(np.uint64)

    def update(self, keys: NDArray[np.uint64], priorities: NDArray[np.floating]) -> Counter[Refusal]:
        """Gives items new priorities; see `Table.update`."""
        keys, priorities = np.asarray(keys), np.asarray(priorities)
        if keys.ndim != 1 or keys.shape != priorities.shape:
            raise ValueError(f"keys and priorities must be [n], not {keys.shape} and {priorities.shape}")
        if keys.dtype != np.uint64 or priorities.dtype.kind != "f":
            raise ValueError(
                f"keys must be uint64, priorities floats, not {keys.dtype} and {priorities.dtype}"
            )
        slots = (keys & _SLOTS).astype(np.int64)
        generations = (keys >> _GENERATION_BITS).astype(np.int64)
        known = slots < self.capacity
        slots[~known] = 0
        latest = self._generations[slots]
        gone = (slots - self._first) % self.capacity >= self.size
        checks: list[tuple[Refusal, NDArray[np.bool_]]] = [
            ("not_finite", ~np.isfinite(priorities)),
            ("negative", priorities < 0),
            ("too_large", priorities > _LARGEST),
            ("unknown", ~known | (generations < 1) | (generations > latest)),
            ("evicted", (generations < latest) | gone),
        ]
        refused: Counter[Refusal] = Counter()
        accepted = np.ones(keys.shape, np.bool_)
        for reason, wrong in checks:
            refused[reason] += int((accepted & wrong).sum())
            accepted &= ~wrong
        self._tree.set(slots[accepted], self._weights(priorities[accepted]))
        return +refused

    def _weights(self, priorities: NDArray[np.floating]) -> NDArray[np.float64]:
        weights: NDArray[np.float64] = np.asarray(priorities, np.float64) ** self._exponent
        return weights

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Copies of all there is to know, the items' from the oldest to the newest."""
        slots = self.oldest(self.size)
        return {
            "item_rows": self._rows[slots],
            "item_weights": self._tree.get(slots),
            "item_times": self._times[slots],
            "item_uses": self._uses[slots],
            "generations": self._generations.copy(),
            "ring": np.array([self._first, self._floor], np.int64),
            "exponent": np.array([self._exponent]),
        }

    def restore(self, state: TableState, jump: int) -> None:
        """Takes over the items of `state`, of which a smaller ring keeps the newest; for a ring still empty.

        Args:
            state: of items of the same length.
            jump: how far above all generations in `state` the next ones are.

        Raises:
            ValueError: `state` is not of such items, or not whole.
        """
        rows = state.array("item_rows", (None, self.length), "i")
        weights = state.array("item_weights", (len(rows),), "f")
        times = state.array("item_times", (len(rows),), "f")
        uses = state.array("item_uses", (len(rows),), "i")
        generations = state.array("generations", (None,), "i")
        first, floor = state.array("ring", (2,), "i").tolist()
        exponent = float(state.array("exponent", (1,), "f")[0])
        if (
            not (0 <= first < len(generations) >= len(rows))
            or not 0 <= generations.min() <= generations.max() <= int(_SLOTS)
            or not 0 <= exponent <= 1
        ):
            raise ValueError("the state's items do not fit their ring")
        floor = max(floor, int(generations.max())) + jump
        if used_up := floor > int(_SLOTS) >> 1:  # begin again; no key is as old as that
            floor = jump
        kept = slice(max(0, len(rows) - self.capacity), len(rows))
        if len(generations) == self.capacity and not used_up:
            self._first, self._generations[:] = first, generations
        else:  # the keys are others too
            self._generations[:] = floor
        slots = (self._first + np.arange(len(rows[kept]))) % self.capacity
        alpha_ratio = self._exponent / exponent if exponent else 0.0
        self._tree.set(slots, weights[kept] if alpha_ratio == 1 else weights[kept] ** alpha_ratio)
        self._rows[slots], self._times[slots], self._uses[slots] = rows[kept], times[kept], uses[kept]
        self.size, self._floor = len(slots), floor
