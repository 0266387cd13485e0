"""The learner's side of the replay service."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.bus.connection import Bus
from shared.errors import Refused
from shared.types import Chunk


class ReplaySample(NamedTuple):
    """Sequences that replay chose by their priorities."""

    keys: NDArray[np.uint64]  # [n], opaque: generation and slot
    probabilities: NDArray[np.float64]  # [n], P(i) when sampled
    size: int  # N, items in the table
    sequences: list[list[Chunk]]  # per item the chunks of its run in order, one row each


class ReplayClient:
    """Asks the run's replay; survives its restarts and those of NATS."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def sample(self, batch_size: int) -> ReplaySample:
        """`batch_size` sequences; waits while replay withholds them. Raises Refused."""
        raise Refused(f"no replay service answers a request for {batch_size} sequences")

    async def update_priorities(self, keys: NDArray[np.uint64], priorities: NDArray[np.float64]) -> None:
        """Acknowledged, at least once; late ones change nothing."""
        raise Refused(f"no replay service takes {len(priorities)} priorities of {len(keys)} sequences")

    async def snapshot(self, name: str) -> dict[str, Any]:
        """Replay writes the snapshot `name`; its name, items, bytes and seconds."""
        raise Refused(f"no replay service writes the snapshot {name}")
