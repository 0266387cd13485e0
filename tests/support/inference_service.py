"""A running inference service, actors that speak the wire by hand, and a learner's side of the queue."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import grpc.aio
from prometheus_client.parser import text_string_to_metric_families

from services.actor.local import LocalOffer
from services.inference.config import InferenceConfig
from services.inference.service import run
from shared.addresses import free_port
from shared.bus.connection import Bus
from shared.bus.weights import publish_weights
from shared.bus.work_queue import QueueConsumer
from shared.checkpoints import weights_to_bytes
from shared.networks.build import build_network
from shared.specs import RunSpec
from shared.types import Chunk
from shared.wire import inference_pb2 as pb
from shared.wire.chunks import decode_chunk
from tests.support.counting_group import ENVIRONMENT, NETWORK, CountingGroup, assert_chunk_is_right
from tests.support.nats import NatsRun
from tests.support.waiting import eventually

ACT = "/seedrl.v1.Inference/Act"


class Ended(Exception):
    """A stream ended; with OK, too."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class ActorStream:
    """One group's stream; `offers`: memory and pipes, which are used if the service takes them."""

    def __init__(
        self, channel: grpc.aio.Channel, group: CountingGroup, run_id: str, *, offers: bool = False
    ) -> None:
        self.group = group
        self.run_id = run_id
        self._call: Any = channel.stream_stream(ACT)()
        self.local = LocalOffer(
            ENVIRONMENT, group_size=group.rows, stream_id=group.stream_id, is_wanted=offers
        )

    async def send(self, data: bytes) -> None:
        if self.local.pipes is not None:
            self.local.pipes.write(data)
            return
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # `receive` tells how it ended
            await self._call.write(data)

    async def receive(self) -> bytes:
        """The next message. Raises Ended."""
        if self.local.pipes is not None and (data := await self.local.pipes.read()) is not None:
            return data
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise Ended(error.code(), error.details() or "") from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise Ended(await self._call.code(), await self._call.details())
        assert isinstance(message, bytes)
        return message

    async def hello(self, **changes: Any) -> None:
        """Says Hello and hears Welcome."""
        offer = self.local.message
        await self.send(self.group.hello(**{"run_id": self.run_id, "shared_memory": offer, **changes}))
        welcome = pb.ActResponse.FromString(await self.receive()).welcome
        assert (welcome.protocol_version, welcome.run_id) == (1, self.run_id)
        self.local.settle(welcome)

    def step(self, **changes: Any) -> bytes:
        """What came of the group's newest step; the observation lies in memory if that was taken."""
        if self.local.leaves is None:
            return self.group.step(**changes)
        self.local.leaves[0][...] = self.group.observations[-1]
        return self.group.step(**{"observation": [], **changes})

    async def ask(self) -> None:
        """Steps the group and sends what came of it."""
        self.group.advance()
        await self.send(self.step())

    async def heard(self) -> pb.Actions:
        """The actions to what was asked."""
        return self.group.take(await self.receive())

    async def play(self, steps: int) -> None:
        for _ in range(steps):
            await self.ask()
            await self.heard()

    async def end(self) -> None:
        """Says that no more will come and waits for the server to agree."""
        self.local.close()
        await self._call.done_writing()
        await self._call.code()

    def break_off(self) -> None:
        self.local.close()
        self._call.cancel()


@dataclass
class InferenceRun:
    """A running service; `task` is its `run`."""

    config: InferenceConfig
    stop: asyncio.Event
    task: "asyncio.Task[None]"
    http: aiohttp.ClientSession
    channel: grpc.aio.Channel

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.config.port}"

    def stream(self, group: CountingGroup, *, offers: bool = False) -> ActorStream:
        return ActorStream(self.channel, group, self.config.run_id, offers=offers)

    async def joined(self, group: CountingGroup, *, offers: bool = False) -> ActorStream:
        """A stream that was welcomed."""
        stream = self.stream(group, offers=offers)
        await stream.hello()
        return stream

    async def status(self) -> dict[str, Any]:
        async with self.http.get("/status") as response:
            answer: dict[str, Any] = await response.json()
            return answer

    async def reasons_not_ready(self) -> list[str]:
        async with self.http.get("/readyz") as response:
            reasons: list[str] = (await response.json())["reasons"]
            assert (response.status == 200) == (not reasons)
            return reasons

    async def exposition(self) -> str:
        async with self.http.get("/metrics") as response:
            return await response.text()

    async def metric(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(await self.exposition()):
            for sample in family.samples:
                if sample.name == f"seedrl_inference_{name}" and sample.labels == labels:
                    return float(sample.value)
        raise AssertionError(f"no metric {name} {labels}")

    async def counted(self, name: str, value: float, *, within: float = 10.0, **labels: str) -> None:
        """Waits until a metric is `value`, for so many seconds at most."""

        async def is_there() -> bool:
            return await self.metric(name, **labels) == value

        await eventually(is_there, timeout=within, what=f"{name} {labels} of {value}")

    async def end(self) -> None:
        """As SIGTERM does."""
        self.stop.set()
        await asyncio.wait_for(self.task, 15)


def inference_config(nats: NatsRun, **settings: Any) -> InferenceConfig:
    """Settings of a service for counting groups on a free port."""
    return InferenceConfig.model_validate(
        {
            "nats_url": nats.url,
            "nats_token": nats.token,
            "run_id": nats.run_id,
            "port": free_port(),
            "http_port": free_port(),
            "network": NETWORK,
            "unroll": 4,
            "batch_size": 4,
            "max_batch_delay": 0.01,
            "device": "cpu",
            "precision": "float32",
            **settings,
        }
    )


def groups(*rows: int, role: str = "train", actor_id: str = "a") -> list[CountingGroup]:
    """Groups of so many environments with the stream ids s0, s1 …"""
    return [
        CountingGroup(each, seed=index, stream_id=f"s{index}", role=role, actor_id=actor_id)
        for index, each in enumerate(rows)
    ]


@asynccontextmanager
async def running_inference(
    nats: NatsRun, *, wait: bool = True, **settings: Any
) -> AsyncIterator[InferenceRun]:
    """A service on the run; `wait`: until it accepts Hello."""
    config = inference_config(nats, **settings)
    stop = asyncio.Event()
    task = asyncio.create_task(run(config, stop=stop))
    try:
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{config.http_port}") as http,
            grpc.aio.insecure_channel(
                f"127.0.0.1:{config.port}",
                options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
            ) as channel,
        ):
            service = InferenceRun(config, stop, task, http, channel)
            await eventually(lambda: _answers(service, wait), what="the service to answer")
            yield service
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


async def _answers(service: InferenceRun, wait: bool) -> bool:
    if service.task.done():
        service.task.result()
    try:
        return not await service.reasons_not_ready() or not wait
    except aiohttp.ClientError:
        return False


class LearnerSide:
    """Publishes weights and reads the queue."""

    def __init__(self, bus: Bus, spec: RunSpec) -> None:
        self.bus = bus
        self.spec = spec
        self._consumer = QueueConsumer(bus)

    async def publish(self, update: int = 0, **changes: Any) -> int:
        """Publishes fresh weights; `changes` replace arguments of `publish_weights`."""
        data = weights_to_bytes(build_network(self.spec).state_dict())
        arguments = {"update": update, "network_hash": self.spec.network_hash, **changes}
        return await publish_weights(self.bus, arguments.pop("data", data), **arguments)

    async def chunks(self, count: int, *, timeout: float = 10.0) -> list[Chunk]:
        """Takes `count` messages out of the queue."""
        found: list[Chunk] = []
        async with asyncio.timeout(timeout):
            while len(found) < count:
                for message in await self._consumer.fetch(count - len(found), timeout=1.0):
                    found.append(decode_chunk(message.data))
                    await message.ack()
        return found

    async def check_chunks(self, count: int, *groups: CountingGroup) -> list[Chunk]:
        """Takes `count` messages and compares each with its group's history."""
        found = await self.chunks(count)
        by_id = {group.stream_id: group for group in groups}
        for chunk in found:
            assert_chunk_is_right(chunk, by_id[chunk.header.stream_id], self.spec)
        return found


@asynccontextmanager
async def learner_side(nats: NatsRun, spec: RunSpec) -> AsyncIterator[LearnerSide]:
    """A learner without learning on the run."""
    async with nats.bus(name="learner") as bus:
        yield LearnerSide(bus, spec)
