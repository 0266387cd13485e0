"""A replay under test with a real work queue: its configuration, its chunks, its accounts."""

import asyncio
import secrets
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from services.replay.accounts import Accounts, load_accounts
from services.replay.config import ReplayConfig
from services.replay.service import run
from shared.bus.connection import Bus
from shared.bus.key_values import create_spec
from shared.bus.streams import ensure_run
from shared.bus.work_queue import ensure_queue, publish_chunk, queue_state
from shared.errors import ConnectionFailed, QueueFull
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from shared.types import Chunk, ChunkHeader
from shared.wire.chunks import encode_chunk
from tests.support.nats import NatsRun
from tests.support.running import RunningService, running
from tests.support.statuses import next_status
from tests.support.waiting import eventually

UNROLL = 4
SPEC = RunSpec(
    environment=EnvironmentSpec(
        observation=(LeafSpec(name="pixels", dtype="uint8", shape=(40, 40), low=(0.0,), high=(255.0,)),),
        num_actions=3,
    ),
    network=NetworkSpec(name="mlp", lstm_size=8, frame_stack=2, hidden_sizes=(8,)),
    agent="r2d2",
    unroll=UNROLL,
    reward_clip=0.0,
    discount=0.99,
    n_steps=5,
)
# An item starts at every second chunk and has three: burn_in reaches one step into the first.
SETTINGS: dict[str, Any] = {
    "agent": "r2d2",
    "network": "mlp",
    "lstm_size": 8,
    "frame_stack": 2,
    "hidden_sizes": (8,),
    "unroll": UNROLL,
    "burn_in": 1,
    "sequence_length": 8,
    "batch_size": 2,
    "replay_capacity": 100,
    "min_replay_size": 1,
    "replay_ratio": 1.0,
    "snapshot_seconds": 1000.0,
    "seed": 1,
}
CHUNKS_PER_ITEM = 3
FREE = {"rate_limiter_error_buffer": 1e9}  # neither side ever waits


def replay_config(nats: NatsRun, run_dir: Path, **settings: Any) -> ReplayConfig:
    """A replay of the test's run."""
    where = {"run_id": nats.run_id, "nats_url": nats.url, "nats_token": nats.token, "run_dir": run_dir}
    return ReplayConfig(**{**where, **SETTINGS, **settings})


def make_chunk(run_id: str, stream_id: str, number: int, *, rows: int = 2, seed: int = 0) -> Chunk:
    """A chunk that replay takes, with frames of its own and TD errors of about 1."""
    random = np.random.default_rng([seed, number])
    chunk = _empty(run_id, stream_id, number, rows)
    frames = random.integers(0, 256, (rows, UNROLL + 1, 40, 40), np.uint8)
    frames[:, :, 5:] = 0  # compresses
    return replace(
        chunk,
        observation={"pixels": frames},
        history={"pixels": frames[:, :1].copy()},
        action=random.integers(0, 3, (rows, UNROLL)),
        reward=random.normal(size=(rows, UNROLL)).astype(np.float32),
        td_errors=random.uniform(0.5, 1.5, (rows, UNROLL)).astype(np.float32),
    )


def _empty(run_id: str, stream_id: str, number: int, rows: int) -> Chunk:
    flags = np.zeros((rows, UNROLL), bool)
    return Chunk(
        header=ChunkHeader(
            run_id=run_id,
            stream_id=stream_id,
            actor_id="actor",
            task="task",
            network_hash=SPEC.network_hash,
            number=number,
            group_size=rows,
            first_row=0,
        ),
        observation={},
        history={},
        is_first=np.zeros((rows, UNROLL + 1), bool),
        action=np.zeros((rows, UNROLL), np.int64),
        reward=np.zeros((rows, UNROLL), np.float32),
        terminated=flags,
        truncated=flags,
        previous_action=np.zeros(rows, np.int64),
        previous_reward=np.zeros(rows, np.float32),
        td_errors=np.zeros((rows, UNROLL), np.float32),
        state=tuple(np.full((rows, 8), number, np.float32) for _ in range(2)),
        weights_version=np.full(UNROLL, 3, np.int64),
        weights_update=np.full(UNROLL, 2, np.int64),
    )


class Queue:
    """What inference does for replay: creates spec and queue, publishes chunks of one stream."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.stream_id = secrets.token_hex(4)
        self.chunks: list[Chunk] = []

    @staticmethod
    async def created(bus: Bus, *, max_messages: int = 100) -> "Queue":
        await create_spec(bus, SPEC)
        await ensure_queue(bus, max_messages)
        await ensure_run(bus)
        return Queue(bus)

    async def publish(self, data: bytes) -> None:
        """Publishes, waiting while the queue is full or NATS away."""
        message_id = secrets.token_hex(8)
        while True:
            try:
                await publish_chunk(self.bus, data, message_id)
                return
            except (ConnectionFailed, QueueFull):
                await asyncio.sleep(0.002)

    async def fed(self, count: int, *, rows: int = 2) -> None:
        """Publishes the stream's next `count` chunks."""
        for _ in range(count):
            chunk = make_chunk(self.bus.run_id, self.stream_id, len(self.chunks), rows=rows)
            self.chunks.append(chunk)
            await self.publish(encode_chunk(chunk))

    def skip(self) -> None:
        """The stream's next chunk never comes."""
        self.chunks.append(make_chunk(self.bus.run_id, self.stream_id, len(self.chunks)))

    async def emptied(self, *, timeout: float = 20.0) -> None:
        """Waits until every message was acknowledged."""

        async def is_empty() -> bool:
            return (await queue_state(self.bus)).messages == 0

        await eventually(is_empty, timeout=timeout, what="the queue to be empty")

    async def exact_accounts(self, run_dir: Path) -> Accounts:
        """The accounts in `run_dir`, once replay has ended; fails unless they add up."""
        accounts, state = load_accounts(run_dir / "replay"), await queue_state(self.bus)
        assert accounts is not None
        assert accounts.refused["lost"] == 0
        assert state.last_sequence == accounts.accounted + state.messages
        return accounts


async def status_of(bus: Bus) -> dict[str, Any]:
    """What the run's replay says of itself now."""
    return await next_status(bus, "replay")


def replaying(config: ReplayConfig, *, fails: bool = False) -> AbstractAsyncContextManager[RunningService]:
    """A replay in this process; see `running`."""
    return running(lambda stop: run(config, stop=stop), fails=fails)
