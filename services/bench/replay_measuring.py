"""The measurements of `seedrl bench replay`: a replay service over NATS, and its table alone."""

import asyncio
import itertools
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np

from services.bench.replay_chunks import RUN_ID, STREAM_ID, Recorder
from services.bench.replay_config import ReplayBenchConfig
from services.local.process import ChildProcess, seedrl
from services.nats_server import NatsServer, embedded_nats
from services.replay.config import ReplayConfig
from services.replay.shelf import Shelf
from shared.addresses import free_port
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.key_values import create_spec
from shared.bus.replay import ReplayClient
from shared.bus.streams import ensure_run
from shared.bus.work_queue import ensure_queue, publish_chunk
from shared.errors import ConnectionFailed, QueueFull, RunError
from shared.types import Array
from shared.wire.chunk_rows import Rows, split_message
from shared.wire.chunks import encode_chunk, rows_per_message, slice_rows

_QUEUED_MESSAGES = 32
_CHUNKS_OF_A_STREAM = 8  # beside those of the first sequence
_START_SECONDS = 60.0
_END_SECONDS = 10.0
_FREE = 1e12  # sequences that either side may be ahead: the limiter is not what is measured

Work = Callable[[], Awaitable[int]]
Status = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured, medians of windows; the core is the table alone, in one process."""

    env: str
    batch_size: int
    windows: int
    inserts_per_second: float  # sequences
    messages_per_second: float  # that brought them
    samples_per_second: float  # sequences
    updates_per_second: float  # priorities
    core_inserts_per_second: float
    core_samples_per_second: float
    core_updates_per_second: float
    bytes_per_step: float  # of all stored, recurrent states included
    steps_per_sequence: int  # stored for each, on average
    sequences: int  # in the table when it was sampled


def replay_settings(config: ReplayBenchConfig) -> dict[str, Any]:
    """Of a replay, and of the agent that it is for."""
    return {
        "agent": "r2d2",
        "network": "auto",
        "frame_stack": config.frame_stack,
        "lstm_size": config.lstm_size,
        "unroll": config.unroll,
        "burn_in": config.burn_in,
        "sequence_length": config.sequence_length,
        "batch_size": config.batch_size,
        "replay_capacity": config.replay_capacity,
        "min_replay_size": 1,
        "replay_ratio": 1.0,
        "rate_limiter_error_buffer": _FREE,
    }


async def measured(config: ReplayBenchConfig, directory: Path) -> Figures:
    """Records, measures the service and then the table. Raises SeedrlError."""
    settings = ReplayConfig.model_validate({"run_id": RUN_ID, **replay_settings(config)})
    recorder = await asyncio.to_thread(Recorder, config.env, config.group_size, settings)
    async with (
        embedded_nats(directory / "nats") as server,
        connected_bus(server.settings, run_id=RUN_ID, name="bench", patient=False) as bus,
    ):
        messages = await asyncio.to_thread(_recorded, config, recorder, bus.max_payload)
        await create_spec(bus, recorder.spec)
        await ensure_queue(bus, _QUEUED_MESSAGES)
        await ensure_run(bus)
        port = free_port()
        async with _replay(config, server, port, directory) as replay, beside(_stays(replay)):
            service = await _service(config, bus, messages, f"http://127.0.0.1:{port}/status")
    core = await asyncio.to_thread(_core, config, settings, [split_message(each) for each in messages])
    return Figures(env=config.env, batch_size=config.batch_size, windows=config.windows, **service, **core)


def _recorded(config: ReplayBenchConfig, recorder: Recorder, max_payload: int) -> list[bytes]:
    """The messages of one stream, in order."""
    most = rows_per_message(recorder.spec, recorder.state_shapes, config.group_size, max_payload)
    try:
        chunks = list(itertools.islice(recorder.chunks(), config.chunks_per_item + _CHUNKS_OF_A_STREAM))
    finally:
        recorder.close()
    return [
        encode_chunk(slice_rows(chunk, first, min(first + most, chunk.rows)))
        for chunk in chunks
        for first in range(0, chunk.rows, most)
    ]


def _streams(messages: Sequence[bytes]) -> Iterator[bytes]:
    """The messages again and again, each time as those of another stream."""
    for number in itertools.count(1):
        stream_id = f"stream-{number:010d}".encode()
        for message in messages:
            yield _of_stream(message, stream_id)


def _of_stream(message: bytes, stream_id: bytes) -> bytes:
    """The message as another stream's, whose id is as long; shared/wire/fields.py says where things are.

    To encode it anew for every stream would take longer than replay takes to insert it.
    """
    end = 12 + int.from_bytes(message[4:8], "little")
    head = message[12:end].replace(STREAM_ID.encode(), stream_id, 1)
    return b"".join((message[:8], zlib.crc32(head).to_bytes(4, "little"), head, message[end:]))


async def _service(
    config: ReplayBenchConfig, bus: Bus, messages: Sequence[bytes], status_url: str
) -> dict[str, Any]:
    client = ReplayClient(bus)
    async with aiohttp.ClientSession() as http:

        async def status() -> dict[str, Any]:
            async with http.get(status_url) as answer:
                return dict(await answer.json())

        await _until(lambda: _serves(status))
        async with beside(_insert(bus, messages)):
            await _until(lambda: _holds(status, config.replay_capacity // 2))
            inserts = await _inserts(config, status)
        items = (await status())["items"]
        known: list[Array] = []

        async def sample() -> int:
            known.append((await client.sample(config.batch_size)).keys)
            del known[:-8]
            return config.batch_size

        async def update() -> int:
            keys = known[0]
            await client.update_priorities(keys, np.ones(len(keys)))
            return len(keys)

        return {
            **inserts,
            "samples_per_second": await _per_second(config, sample),
            "updates_per_second": await _per_second(config, update),
            "sequences": items,
        }


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Polls another process. Raises RunError after a minute."""
    deadline = time.monotonic() + _START_SECONDS
    while not await is_so():
        if time.monotonic() > deadline:
            raise RunError(f"replay did not come as far within {_START_SECONDS:g} s")
        await asyncio.sleep(0.1)


async def _serves(status: Status) -> bool:
    try:
        return not (await status())["waiting"]
    except aiohttp.ClientError:
        return False


async def _holds(status: Status, items: int) -> bool:
    return int((await status())["items"]) >= items


async def _insert(bus: Bus, messages: Sequence[bytes]) -> None:
    """Keeps the queue full, for ever."""
    for number, message in enumerate(_streams(messages)):
        while True:
            try:
                await publish_chunk(bus, message, f"bench-{number}")
                break
            except (ConnectionFailed, QueueFull):
                await asyncio.sleep(0.002)


async def _inserts(config: ReplayBenchConfig, status: Status) -> dict[str, float]:
    async def reading() -> tuple[float, int, int]:
        said = await status()
        return time.monotonic(), int(said["inserted_items"]), int(said["chunks"]["inserted"])

    readings = [await reading()]
    for _ in range(config.windows):
        await asyncio.sleep(config.window_seconds)
        readings.append(await reading())
    pairs = list(itertools.pairwise(readings))
    return {
        "inserts_per_second": median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs),
        "messages_per_second": median((b[2] - a[2]) / (b[0] - a[0]) for a, b in pairs),
    }


async def _per_second(config: ReplayBenchConfig, work: Work) -> float:
    """Median over windows of what `work` says it did, one call after the other."""
    await work()
    speeds = []
    for _ in range(config.windows):
        began, done = time.monotonic(), 0
        while time.monotonic() - began < config.window_seconds:
            done += await work()
        speeds.append(done / (time.monotonic() - began))
    return median(speeds)


def _core(config: ReplayBenchConfig, settings: ReplayConfig, messages: Sequence[Rows]) -> dict[str, Any]:
    """The table without anything around it."""
    shelf = Shelf(settings, seed=0)
    rows = _renamed(messages)
    while shelf.table.size < config.replay_capacity / 2:
        shelf.insert(next(rows), now=time.time())

    def insert() -> int:
        return shelf.insert(next(rows), now=time.time()).items

    inserts = _core_speed(config, insert)
    keys = [shelf.sample(config.batch_size, now=time.time()).keys]

    def sample() -> int:
        keys[0] = shelf.sample(config.batch_size, now=time.time()).keys
        return config.batch_size

    def update() -> int:
        shelf.update(keys[0], np.ones(len(keys[0])))
        return len(keys[0])

    stored = shelf.table.rows * config.unroll
    return {
        "core_inserts_per_second": inserts,
        "core_samples_per_second": _core_speed(config, sample),
        "core_updates_per_second": _core_speed(config, update),
        "bytes_per_step": shelf.table.total_bytes / stored,
        "steps_per_sequence": round(stored / shelf.table.size),
    }


def _renamed(messages: Sequence[Rows]) -> Iterator[Rows]:
    """As `_streams`; the records keep the name of the first."""
    for number in itertools.count():
        for rows in messages:
            yield rows._replace(header=replace(rows.header, stream_id=f"stream-{number}"))


def _core_speed(config: ReplayBenchConfig, work: Callable[[], int]) -> float:
    speeds = []
    for _ in range(config.windows):
        began, done = time.monotonic(), 0
        while time.monotonic() - began < config.window_seconds / 4:
            done += work()
        speeds.append(done / (time.monotonic() - began))
    return median(speeds)


@asynccontextmanager
async def _replay(
    config: ReplayBenchConfig, server: NatsServer, port: int, directory: Path
) -> AsyncIterator[ChildProcess]:
    """The service as a run has it."""
    where = ("--run-id", RUN_ID, "--nats-url", server.url, "--http-port", str(port), "--log-format", "json")
    options = [
        word
        for name, value in replay_settings(config).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    process = ChildProcess(
        "replay",
        lambda: seedrl("replay", *where, "--run-dir", str(directory / "run"), *options),
        environment={"SEEDRL_NATS_TOKEN": server.token},
        log=directory / "replay.log",
    )
    await process.start()
    try:
        yield process
    finally:
        process.terminate()
        await process.ended(within=_END_SECONDS)


async def _stays(replay: ChildProcess) -> None:
    """Raises RunError when the service ends."""
    await replay.wait()
    raise RunError(f"replay ended: {replay.last_words()}")
