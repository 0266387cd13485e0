"""One measurement: the services and the load around it, and what a window of seconds says."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from services.bench.cpu import cpu_seconds
from services.bench.service_process import last_words, running, stays
from services.bench.transport_config import TransportConfig
from services.bench.transport_frames import record
from services.bench.transport_load import LoadPlan, LoadResult
from services.local.process import ChildProcess, clean_environment, module, seedrl
from services.nats_server import NatsServer, embedded_nats
from shared.addresses import free_port
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.key_values import create_spec
from shared.bus.weights import publish_weights
from shared.bus.work_queue import QueueConsumer
from shared.checkpoints import weights_to_bytes
from shared.config import AgentSettings
from shared.errors import RunError
from shared.networks.build import build_network
from shared.networks.precision import resolve_device
from shared.run_spec import own_spec
from shared.specs import RunSpec
from shared.wire.chunks import read_header

_RUN_ID = "bench"
_NETWORK = "services.bench.transport_network:FreeNetwork"
_AGENT = AgentSettings.model_validate({"network": _NETWORK, "frame_stack": 4, "unroll": 20})
_QUEUED_BATCHES = 16  # so that it is not the consumer who is measured
_STREAMS_OF_A_PROCESS = 2
_START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured; CPU seconds are of user and system together."""

    observation: tuple[int, ...]
    group_size: int
    streams: int
    shared_memory: bool
    pipes: bool
    device: str
    seconds: float
    rows_per_second: float
    messages_per_second: float
    latency_p50_ms: float
    latency_p99_ms: float
    chunk_megabytes_per_second: float
    chunks_per_second: float
    inference_cpu_seconds_per_row: float
    load_cpu_seconds_per_row: float
    nats_cpu_seconds_per_row: float
    consumer_cpu_seconds_per_row: float
    cores: int


class _Reading(NamedTuple):
    """Counters at one moment."""

    chunks: int
    chunk_bytes: int
    cpu: dict[str, float]  # seconds


async def measured(config: TransportConfig, directory: Path) -> Figures:
    """Starts everything below `directory`, measures, ends everything. Raises SeedrlError."""
    config = config.model_copy(update={"device": str(resolve_device(config.device))})
    frames = directory / "frames.npz"
    num_actions = await asyncio.to_thread(record, frames)
    port = free_port()
    streams = [
        min(_STREAMS_OF_A_PROCESS, config.streams - first)
        for first in range(0, config.streams, _STREAMS_OF_A_PROCESS)
    ]
    plans = [
        LoadPlan(
            address=f"127.0.0.1:{port}",
            run_id=_RUN_ID,
            frames=str(frames),
            observation=config.observation,
            num_actions=num_actions,
            group_size=config.group_size,
            streams=count,
            shared_memory=config.shared_memory,
        )
        for count in streams
    ]
    async with (
        embedded_nats(directory / "nats") as server,
        connected_bus(server.settings, run_id=_RUN_ID, name="bench", patient=False) as bus,
    ):
        await _begin(bus, own_spec(_AGENT, plans[0].spec))
        sink = ChunkSink(bus)
        async with (
            _inference(server, port, directory, config.device) as inference,
            _loads(plans) as loads,
            beside(sink.run(), stays(inference), server.stays()),
        ):
            pids: dict[str, list[int]] = {
                "inference": [pid for pid in (inference.pid,) if pid],
                "load": [load.pid for load in loads],
                "nats": [server.process.pid],
                "consumer": [os.getpid()],
            }
            return await _window(config, loads, sink, pids)


async def _begin(bus: Bus, spec: RunSpec) -> None:
    """The run's spec and its first weights: without a learner, and without waiting for an actor."""
    await create_spec(bus, spec)
    data = weights_to_bytes(build_network(spec).state_dict())
    await publish_weights(bus, data, update=0, network_hash=spec.network_hash)


class ChunkSink:
    """Takes and acknowledges every chunk; looks at its header only."""

    def __init__(self, bus: Bus) -> None:
        self._consumer = QueueConsumer(bus)
        self.chunks = 0
        self.chunk_bytes = 0

    async def run(self) -> None:
        """For ever."""
        while True:
            for message in await self._consumer.fetch(16, timeout=1.0):
                self.chunk_bytes += len(message.data)
                self.chunks += read_header(message.data).first_row == 0  # further ones are its other rows
                await message.ack()


async def _window(
    config: TransportConfig, loads: list["_Load"], sink: ChunkSink, pids: Mapping[str, Sequence[int]]
) -> Figures:
    try:
        async with asyncio.timeout(_START_SECONDS):
            for load in loads:
                await load.ready()
    except TimeoutError:
        raise RunError(f"no stream was answered within {_START_SECONDS:g} s") from None
    begin = time.monotonic() + config.warm_up
    end = begin + config.seconds
    for load in loads:
        load.measure(begin, end)
    readings = []
    for moment in (begin, end):
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        cpu = {name: sum(map(cpu_seconds, numbers)) for name, numbers in pids.items()}
        readings.append(_Reading(sink.chunks, sink.chunk_bytes, cpu))
    results = [await load.result() for load in loads]
    return _figures(config, results, *readings)


def _figures(
    config: TransportConfig, results: Sequence[LoadResult], before: _Reading, after: _Reading
) -> Figures:
    latencies = np.concatenate([result.latencies for result in results])
    if not len(latencies):
        raise RunError("no step was answered within the window; give a larger --seconds")
    rows = len(latencies) * config.group_size
    p50, p99 = np.percentile(latencies, (50, 99)) * 1e3

    def per_row(name: str) -> float:
        return (after.cpu[name] - before.cpu[name]) / rows

    return Figures(
        observation=config.observation,
        group_size=config.group_size,
        streams=config.streams,
        shared_memory=config.shared_memory,
        pipes=all(result.pipes for result in results),
        device=config.device,
        seconds=config.seconds,
        rows_per_second=rows / config.seconds,
        messages_per_second=len(latencies) / config.seconds,
        latency_p50_ms=float(p50),
        latency_p99_ms=float(p99),
        chunk_megabytes_per_second=(after.chunk_bytes - before.chunk_bytes) / 1e6 / config.seconds,
        chunks_per_second=(after.chunks - before.chunks) / config.seconds,
        inference_cpu_seconds_per_row=per_row("inference"),
        load_cpu_seconds_per_row=per_row("load"),
        nats_cpu_seconds_per_row=per_row("nats"),
        consumer_cpu_seconds_per_row=per_row("consumer"),
        cores=len(os.sched_getaffinity(0)),
    )


@contextlib.asynccontextmanager
async def _inference(
    server: NatsServer, port: int, directory: Path, device: str
) -> AsyncIterator[ChildProcess]:
    """The service as a run has it."""
    where = ("--run-id", _RUN_ID, "--nats-url", server.url, "--port", str(port), "--log-format", "json")
    agent = ("--network", _NETWORK, "--frame-stack", str(_AGENT.frame_stack), "--unroll", str(_AGENT.unroll))
    # A free policy gains nothing from larger batches, so no request waits for another one.
    how = ("--device", device, "--max-batch-delay", "0", "--max-queued-batches", str(_QUEUED_BATCHES))
    process = ChildProcess(
        "inference",
        lambda: seedrl("inference", *where, *agent, *how),
        environment={"SEEDRL_NATS_TOKEN": server.token},
        log=directory / "inference.log",
    )
    async with running(process):
        yield process


class _Load:
    """A running load process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._input, self._output, self._errors = process.stdin, process.stdout, process.stderr
        self.pid = process.pid

    async def ready(self) -> None:
        """Waits until every stream was answered. Raises RunError when one cannot be."""
        if await self._output.readline() != b"ready\n":
            await self._fail()

    def measure(self, begin: float, end: float) -> None:
        """Names the window, on the monotonic clock."""
        self._input.write(f"{begin!r} {end!r}\n".encode())

    async def result(self) -> LoadResult:
        """Once the window is over. Raises RunError."""
        output = await self._output.read()
        if await self._process.wait() != 0:
            await self._fail()
        return LoadResult(**orjson.loads(output))

    async def _fail(self) -> None:
        raise RunError(f"load: {last_words(await self._errors.read())}")


@contextlib.asynccontextmanager
async def _loads(plans: list[LoadPlan]) -> AsyncIterator[list[_Load]]:
    """A process for each plan; they are gone on leaving."""
    pipe = asyncio.subprocess.PIPE
    async with contextlib.AsyncExitStack() as stack:
        loads = []
        for plan in plans:
            process = await asyncio.create_subprocess_exec(
                *module("services.bench.transport_load", orjson.dumps(tuple(plan)).decode()),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=clean_environment(),
                start_new_session=True,  # Ctrl-C is answered by this process alone
            )
            stack.push_async_callback(_killed, process)
            loads.append(_Load(process))
        yield loads


async def _killed(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
