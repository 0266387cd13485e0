"""A replay in this process, with what the learner needs of one; its counts go out on NATS."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.bus.connection import Bus
from shared.bus.control import publish_status
from shared.bus.replay import ReplaySample
from shared.errors import Refused
from shared.specs import RunSpec
from shared.types import Chunk
from tests.support.learner_chunks import make_chunk
from tests.support.waiting import eventually


class MemoryReplay:
    """Holds sequences of `chunks` successive chunks and samples them in turn."""

    def __init__(self, bus: Bus, spec: RunSpec, *, chunks: int) -> None:
        self.steps = 0
        self.inserted = 0  # chunks
        self.sequences: list[list[Chunk]] = []
        self.priorities: dict[int, float] = {}
        self.snapshots: list[str] = []
        self.may_sample = asyncio.Event()
        self.may_update = asyncio.Event()
        self.may_snapshot = asyncio.Event()
        for may in (self.may_sample, self.may_update, self.may_snapshot):
            may.set()
        self.snapshots_asked: list[str] = []
        self.refusal: Refused | None = None  # of snapshots
        self.samples = 0
        self._bus = bus
        self._spec = spec
        self._chunks = chunks
        self._next = 0

    async def insert(self, count: int, *, update: int = 0) -> None:
        """Inserts `count` sequences of streams of their own, and says so."""
        for _ in range(count):
            number = len(self.sequences)
            chunks = [
                make_chunk(
                    spec=self._spec,
                    rows=1,
                    run_id=self._bus.run_id,
                    stream_id=f"stream-{number}",
                    number=k,
                    update=update,
                    seed=100 * number + k,
                )
                for k in range(self._chunks)
            ]
            errors = np.zeros((1, self._spec.unroll), np.float32)
            self.sequences.append(
                [replace(chunk, behaviour_logits=None, td_errors=errors) for chunk in chunks]
            )
            self.priorities[number] = 1.0
            self.inserted += self._chunks
            self.steps += sum(chunk.steps for chunk in chunks)
        await self.say()

    async def say(self) -> None:
        """Publishes the status that the service publishes each second."""
        status = {
            "steps": self.steps,
            "items": len(self.sequences),
            "inserted_items": len(self.sequences),
            "chunks": {"inserted": self.inserted, "refused_by_reason": {"spec": 1}, "redelivered": 2},
        }
        await publish_status(self._bus, "replay", "memory", status)

    async def sample(self, batch_size: int) -> ReplaySample:
        await self.may_sample.wait()
        await eventually(lambda: len(self.sequences) >= batch_size)
        numbers = [(self._next + i) % len(self.sequences) for i in range(batch_size)]
        self._next += batch_size
        self.samples += batch_size
        return ReplaySample(
            keys=np.array(numbers, np.uint64),
            probabilities=np.full(batch_size, 1 / len(self.sequences)),
            size=len(self.sequences),
            sequences=[self.sequences[number] for number in numbers],
        )

    async def update_priorities(self, keys: NDArray[np.uint64], priorities: NDArray[np.float64]) -> None:
        await self.may_update.wait()
        await asyncio.sleep(0)
        self.priorities.update(zip(keys.tolist(), priorities.tolist(), strict=True))

    async def snapshot(self, name: str) -> dict[str, Any]:
        self.snapshots_asked.append(name)
        await self.may_snapshot.wait()
        if self.refusal is not None:
            raise self.refusal
        self.snapshots.append(name)
        return {"name": name, "items": len(self.sequences), "bytes": 0, "seconds": 0.0}


@asynccontextmanager
async def memory_replay(bus: Bus, spec: RunSpec, *, chunks: int) -> AsyncIterator[MemoryReplay]:
    """A replay that says its counts again and again."""
    held = MemoryReplay(bus, spec, chunks=chunks)

    async def say() -> None:
        while True:
            await held.say()
            await asyncio.sleep(0.2)

    saying = asyncio.create_task(say())
    try:
        yield held
    finally:
        saying.cancel()
        await asyncio.wait([saying])
