"""A learner under test with a real work queue: its configuration, its chunks, its accounts."""

import asyncio
import secrets
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from services.learner.accounts import Accounts, load_accounts, summary
from services.learner.config import LearnerConfig
from services.learner.service import run
from shared.bus.connection import Bus
from shared.bus.key_values import create_spec
from shared.bus.streams import ensure_run
from shared.bus.work_queue import ensure_queue, publish_chunk, queue_state
from shared.errors import QueueFull
from shared.specs import RunSpec
from shared.types import Chunk
from shared.wire.chunks import encode_chunk
from tests.support.learner_chunks import make_chunk, make_spec
from tests.support.nats import NatsRun
from tests.support.running import RunningService, running
from tests.support.waiting import eventually

UNROLL = 4
BATCH_SIZE = 4
SETTINGS: dict[str, Any] = {
    "network": "mlp",
    "hidden_sizes": (8,),
    "unroll": UNROLL,
    "batch_size": BATCH_SIZE,
    "learning_rate_schedule": "constant",
    "max_policy_lag": 1_000_000,
    "publish_seconds": 0.0,
    "seed": 1,
}


def learner_spec(**changes: Any) -> RunSpec:
    """The spec of the run that `SETTINGS` belong to."""
    return make_spec(**{"unroll": UNROLL, "hidden_sizes": (8,), **changes})


def learner_config(nats: NatsRun, run_dir: Path, **settings: Any) -> LearnerConfig:
    """A learner of the test's run."""
    where = {"run_id": nats.run_id, "nats_url": nats.url, "nats_token": nats.token, "run_dir": run_dir}
    return LearnerConfig(**{**where, **SETTINGS, **settings})


class Queue:
    """What inference does for the learner: creates spec and queue, publishes chunks."""

    def __init__(self, bus: Bus, spec: RunSpec) -> None:
        self.bus = bus
        self.spec = spec
        self.rows: dict[int, int] = {}  # of each message published, by its sequence
        self._stream = secrets.token_hex(4)
        self._number = 0

    @staticmethod
    async def created(bus: Bus, *, max_messages: int = 100, spec: RunSpec | None = None) -> "Queue":
        queue = Queue(bus, await create_spec(bus, spec or learner_spec()))
        await ensure_queue(bus, max_messages)
        await ensure_run(bus)
        return queue

    def chunk(self, rows: int = 2, *, update: int = 0) -> Chunk:
        """The next chunk."""
        self._number += 1
        return make_chunk(
            spec=self.spec,
            rows=rows,
            run_id=self.bus.run_id,
            stream_id=self._stream,
            number=self._number,
            update=update,
            seed=self._number,
        )

    async def publish(self, *chunks: Chunk | bytes) -> int:
        """Publishes, waiting while the queue is full; the last one's sequence."""
        sequence = 0
        for chunk in chunks:
            data = chunk if isinstance(chunk, bytes) else encode_chunk(chunk)
            rows = 0 if isinstance(chunk, bytes) else chunk.rows
            message_id = secrets.token_hex(8)
            while True:
                try:
                    sequence = await publish_chunk(self.bus, data, message_id)
                    break
                except QueueFull:
                    await asyncio.sleep(0.002)
            self.rows[sequence] = rows
        return sequence

    async def fed(self, count: int, *, rows: int = 2, update: int = 0) -> int:
        """Publishes `count` chunks of `rows` rows; the last one's sequence."""
        return await self.publish(*(self.chunk(rows, update=update) for _ in range(count)))

    async def holds_at_most(self, messages: int) -> bool:
        return (await queue_state(self.bus)).messages <= messages

    async def is_empty(self) -> bool:
        return await self.holds_at_most(0)

    async def emptied(self, *, timeout: float = 20.0) -> None:
        """Waits until every message was acknowledged."""
        await eventually(self.is_empty, timeout=timeout, what="the queue to be empty")

    async def exact_accounts(self, run_dir: Path) -> Accounts:
        """The accounts in `run_dir`, once the learner has ended; fails unless they add up."""
        accounts, state = load_accounts(run_dir), await queue_state(self.bus)
        chunks = summary(accounts, state)["chunks"]
        assert chunks["published"] == state.last_sequence
        assert chunks["published"] == chunks["trained"] + chunks["refused"] + chunks["queued"], chunks
        assert accounts.refused["lost"] == 0
        assert accounts.lags.total() == accounts.trained
        return accounts


def learning(config: LearnerConfig, *, fails: bool = False) -> AbstractAsyncContextManager[RunningService]:
    """A learner in this process; see `running`."""
    return running(lambda stop: run(config, stop=stop), fails=fails)
