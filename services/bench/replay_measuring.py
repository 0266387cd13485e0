"""One measurement of replay: the service, its queue and its client around it."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import aiohttp
import numpy as np
import orjson

from services.actor.environments import GroupMaker
from services.bench.replay_chunks import Recording, recorded, renamed
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_core import CoreFigures, core_figures
from services.bench.service_process import running, stays
from services.local.process import ChildProcess, seedrl
from services.nats_server import NatsServer, embedded_nats
from services.replay.config import ReplayConfig
from shared.addresses import free_port
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.key_values import create_spec
from shared.bus.replay import ReplayClient
from shared.bus.streams import ensure_run
from shared.bus.work_queue import ensure_queue, publish_chunk
from shared.config import AgentSettings, SequenceSettings
from shared.errors import QueueFull, RunError

_RUN_ID = "bench"
_QUEUED_MESSAGES = 64
_POLL_SECONDS = 0.005
_WINDOW_SECONDS = 300.0  # within which what was sent must have been inserted
_TOLD = (
    "replay_capacity",
    "min_replay_size",
    "rate_limiter_error_buffer",
    "seed",
    *AgentSettings.model_fields,
    *SequenceSettings.model_fields,
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured; medians over the windows."""

    env: str
    inserts_per_second: float  # sequences completed
    messages_per_second: float  # chunk messages, meanwhile
    samples_per_second: float  # sequences
    updates_per_second: float  # priorities
    core_inserts_per_second: float
    core_samples_per_second: float
    core_updates_per_second: float
    bytes_per_step: float
    bytes_per_message: float
    sequences: int  # completed by a window of inserts
    batch_size: int
    environments: int
    windows: int
    cores: int


async def measured(config: ReplayBenchConfig, directory: Path) -> Figures:
    """Starts everything below `directory`, measures, ends everything. Raises SeedrlError."""
    maker = GroupMaker(env=config.env, group_size=config.environments, env_kwargs=config.env_kwargs)
    recording = await asyncio.to_thread(
        partial(recorded, maker, config, run_id=_RUN_ID, chunks=config.chunks, seed=0)
    )
    replay = config.replay(run_id=_RUN_ID, run_dir=directory)
    async with (
        embedded_nats(directory / "nats") as server,
        connected_bus(server.settings, run_id=_RUN_ID, name="bench", patient=False) as bus,
    ):
        await create_spec(bus, recording.spec)
        await ensure_queue(bus, _QUEUED_MESSAGES)
        await ensure_run(bus)
        port = free_port()
        async with (
            _service(server, replay, port, directory) as process,
            beside(stays(process), server.stays()),
        ):
            async with aiohttp.ClientSession() as http:
                service = _Service(config, bus, http, port)
                inserts = await service.inserts(recording)
            samples, updates = await service.samples(), await service.updates()
    core = await asyncio.to_thread(partial(core_figures, config, replay, recording.messages))
    return _figures(config, recording, core, inserts, samples, updates)


def _figures(
    config: ReplayBenchConfig,
    recording: Recording,
    core: CoreFigures,
    inserts: float,
    samples: float,
    updates: float,
) -> Figures:
    messages = recording.messages
    return Figures(
        env=config.env,
        inserts_per_second=inserts,
        messages_per_second=inserts * config.streams * len(messages) / config.sequences_per_window,
        samples_per_second=samples,
        updates_per_second=updates,
        core_inserts_per_second=core.inserts_per_second,
        core_samples_per_second=core.samples_per_second,
        core_updates_per_second=core.updates_per_second,
        bytes_per_step=core.bytes_per_step,
        bytes_per_message=sum(map(len, messages)) / len(messages),
        sequences=config.sequences_per_window,
        batch_size=config.batch_size,
        environments=config.environments,
        windows=config.windows,
        cores=len(os.sched_getaffinity(0)),
    )


class _Service:
    """Sends to the running replay and asks it, and says how fast that went."""

    def __init__(self, config: ReplayBenchConfig, bus: Bus, http: aiohttp.ClientSession, port: int) -> None:
        self._config = config
        self._bus = bus
        self._http = http
        self._status = f"http://127.0.0.1:{port}/status"
        self._client = ReplayClient(bus)

    async def inserts(self, recording: Recording) -> float:
        """Sequences per second; each window is all that was recorded, of streams of its own."""
        speeds = []
        for window in range(self._config.windows + 1):  # the first one warms up
            streams = await asyncio.to_thread(self._encoded, recording, window)
            began = time.monotonic()
            sending = (self._publish(stream_id, messages) for stream_id, messages in streams.items())
            try:
                async with asyncio.timeout(_WINDOW_SECONDS), beside(*sending):
                    await self._reached((window + 1) * self._config.sequences_per_window)
            except TimeoutError:
                raise RunError(f"replay did not take in {_WINDOW_SECONDS:g} s what was sent") from None
            speeds.append(self._config.sequences_per_window / (time.monotonic() - began))
        return median(speeds[1:])

    async def samples(self) -> float:
        """Sequences per second, one batch after the other."""

        async def sample() -> None:
            await self._client.sample(self._config.batch_size)

        return await self._calls_per_second(sample) * self._config.batch_size

    async def updates(self) -> float:
        """Priorities per second, a batch's after the other's."""
        keys = (await self._client.sample(self._config.batch_size)).keys
        rng = np.random.default_rng(0)

        async def update() -> None:
            await self._client.update_priorities(keys, rng.random(len(keys)))

        return await self._calls_per_second(update) * len(keys)

    async def _calls_per_second(self, call: Callable[[], Awaitable[None]]) -> float:
        await call()
        speeds = []
        for _ in range(self._config.windows):
            calls, began = 0, time.monotonic()
            while time.monotonic() < began + self._config.window_seconds:
                await call()
                calls += 1
            speeds.append(calls / (time.monotonic() - began))
        return median(speeds)

    def _encoded(self, recording: Recording, window: int) -> dict[str, list[bytes]]:
        ids = [f"{window}-{stream}" for stream in range(self._config.streams)]
        return {each: [renamed(message, each) for message in recording.messages] for each in ids}

    async def _publish(self, stream_id: str, messages: list[bytes]) -> None:
        for number, message in enumerate(messages):
            while True:
                with contextlib.suppress(QueueFull):
                    await publish_chunk(self._bus, message, f"{stream_id}-{number}")
                    break
                await asyncio.sleep(_POLL_SECONDS)

    async def _reached(self, sequences: int) -> None:
        """Waits until so many were ever inserted. Raises RunError when messages are refused."""
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):  # not listening yet
                async with self._http.get(self._status) as answer:
                    status = await answer.json()
                if status["chunks"] and status["chunks"]["refused"]:
                    raise RunError(f"replay refused chunks: {status['chunks']['refused_by_reason']}")
                if status["inserted_items"] >= sequences:
                    return
            await asyncio.sleep(_POLL_SECONDS)


@contextlib.asynccontextmanager
async def _service(
    server: NatsServer, replay: ReplayConfig, port: int, directory: Path
) -> AsyncIterator[ChildProcess]:
    """The service as a run has it."""
    settings = directory / "replay.yaml"  # of which JSON is a part
    settings.write_bytes(orjson.dumps({name: getattr(replay, name) for name in _TOLD}))
    where = ("--run-id", replay.run_id, "--run-dir", str(directory), "--nats-url", server.url)
    process = ChildProcess(
        "replay",
        lambda: seedrl(
            "replay", *where, "--preset", str(settings), "--http-port", str(port), "--log-format", "json"
        ),
        environment={"SEEDRL_NATS_TOKEN": server.token},
        log=directory / "replay.log",
    )
    async with running(process):
        yield process
