"""Who is refused and what that does to others, over a real gRPC connection."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest

from services.inference import streams
from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.hello import to_proto_observation
from shared.wire.limits import MAX_MESSAGE_BYTES
from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import (
    ActorStream,
    Ended,
    InferenceRun,
    LearnerSide,
    groups,
    learner_side,
    running_inference,
)
from tests.support.nats import NatsRun

SPEC = counting_spec(unroll=4)


class Peers:
    """A service with a healthy actor, which goes on whatever others do."""

    def __init__(self, service: InferenceRun, learner: LearnerSide, healthy: ActorStream) -> None:
        self.service = service
        self.learner = learner
        self.healthy = healthy

    async def refusal(self, stream: ActorStream, *, reason: str, **sent: Any) -> Ended:
        """How `stream` ends upon a Step with these changes; the healthy one plays on."""
        before = await self.service.metric("refused_messages_total", reason=reason)
        stream.group.advance()
        await stream.send(stream.step(**sent))
        with pytest.raises(Ended) as ended:
            await stream.heard()
        await self.healthy.play(1)
        await self.service.counted("refused_messages_total", before + 1, reason=reason)
        return ended.value


@pytest.fixture
async def peers(nats: NatsRun) -> AsyncIterator[Peers]:
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_inference(nats, max_environments=8))
        learner = await stack.enter_async_context(learner_side(nats, SPEC))
        await learner.publish()
        healthy = await service.joined(CountingGroup(2, seed=9, stream_id="healthy"))
        await healthy.play(1)
        yield Peers(service, learner, healthy)


BAD_STEPS: list[tuple[dict[str, Any], str, str]] = [
    ({"sequence": 5}, "sequence", "sequence is 5, expected 1"),
    ({"observation": []}, "leaves", "observation has 0 leaves, expected 1"),
    ({"observation": [bytes(11)]}, "bytes", "observation 'observation' has 11 bytes, expected 2 × 12 = 24"),
    ({"reward": np.array([0.0, np.nan], "<f4").tobytes()}, "reward", "reward of row 1 is nan"),
    ({"is_first": bytes([2, 0])}, "flags", "is_first holds 2, expected 0 or 1"),
]


@pytest.mark.parametrize(("changes", "reason", "words"), BAD_STEPS)
async def test_a_bad_step_ends_its_own_stream_only(
    peers: Peers, changes: dict[str, Any], reason: str, words: str
) -> None:
    stream = await peers.service.joined(CountingGroup(2, seed=1))
    await stream.play(1)
    ended = await peers.refusal(stream, reason=reason, **changes)
    assert ended.code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in ended.details
    assert await peers.service.metric("streams") == 1


async def test_garbage_is_counted_and_answered(peers: Peers) -> None:
    for data, when in ((b"\xff\xff\xff", "hello"), (b"GET / HTTP/1.1\r\n", "step")):
        stream = peers.service.stream(CountingGroup(1, stream_id=when))
        if when == "step":
            await stream.hello()
        await stream.send(data)
        with pytest.raises(Ended, match="not an ActRequest") as ended:
            await stream.receive()
        assert ended.value.code is grpc.StatusCode.INVALID_ARGUMENT
    await peers.service.counted("refused_messages_total", 2, reason="garbage")
    await peers.healthy.play(1)


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES + 2**20, 4 * MAX_MESSAGE_BYTES])
async def test_a_message_above_the_limit_ends_its_own_stream_only(peers: Peers, size: int) -> None:
    stream = await peers.service.joined(CountingGroup(2, seed=1))
    await stream.send(bytes(size))
    with pytest.raises(Ended, match="larger than max") as ended:
        await stream.receive()
    assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await peers.service.counted("refused_messages_total", 1, reason="size")
    await peers.healthy.play(1)
    stream = await peers.service.joined(CountingGroup(2, seed=1, stream_id="s2"))
    await stream.send(bytes(2**20))
    with pytest.raises(Ended, match="message has 1048576 bytes") as ended:
        await stream.receive()
    assert ended.value.code is grpc.StatusCode.INVALID_ARGUMENT


OTHER = EnvironmentSpec(
    observation=(LeafSpec(name="observation", dtype="float32", shape=(4,), low=(0.0,), high=(1.0,)),),
    num_actions=16,
)
LARGE = EnvironmentSpec(
    observation=(LeafSpec(name="observation", dtype="uint8", shape=(2**18,), low=(0.0,), high=(1.0,)),),
    num_actions=16,
)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"run_id": "another"}, "run_id", "this service belongs to run"),
        ({"protocol_version": 99}, "protocol_version", "hello.protocol_version"),
        ({"stream_id": "healthy"}, "stream_id", "healthy was used before"),
        ({"group_size": 9}, "group_size", "9 environments; this service takes 8 at most"),
        ({"action": pb.DiscreteActionSpec(n=3)}, "spaces", "the run has 16 actions, this environment 3"),
        ({"observation": to_proto_observation(OTHER)}, "spaces", "observation is observation: float32[4]"),
        ({"role": 7}, "hello", "hello.role"),
    ],
)
async def test_a_hello_that_does_not_fit_is_refused_in_words(
    peers: Peers, changes: dict[str, Any], reason: str, words: str
) -> None:
    stream = peers.service.stream(CountingGroup(2))
    with pytest.raises(Ended) as ended:
        await stream.hello(**changes)
    assert ended.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in ended.value.details
    await peers.service.counted("refused_messages_total", 1, reason=reason)
    await peers.healthy.play(1)


async def test_a_step_before_hello_and_a_hello_after_it_are_refused(peers: Peers) -> None:
    stream = peers.service.stream(CountingGroup(2))
    await stream.ask()
    with pytest.raises(Ended, match="must be a Hello"):
        await stream.receive()
    stream = await peers.service.joined(CountingGroup(2))
    await stream.send(stream.group.hello(run_id=peers.service.config.run_id))
    with pytest.raises(Ended, match="must be a Step"):
        await stream.receive()
    await peers.service.counted("refused_messages_total", 2, reason="order")


async def test_a_stream_id_is_used_once_also_after_its_end(peers: Peers) -> None:
    stream = await peers.service.joined(CountingGroup(2))
    await stream.end()
    with pytest.raises(Ended, match="was used before"):
        await peers.service.joined(CountingGroup(2))


async def test_a_full_service_tells_actors_to_come_again(peers: Peers) -> None:
    first, second = groups(5, 2)
    stream = await peers.service.joined(first)
    with pytest.raises(Ended, match="full: 1 of 8 environments are free, this group has 2") as ended:
        await peers.service.joined(second)
    assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await stream.end()
    await peers.service.joined(second)


@pytest.mark.parametrize("part", ["Group", "taken", "Stream"])
async def test_a_group_that_cannot_be_set_up_leaves_its_slots_free(
    peers: Peers, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 64. GiB")

    first = peers.service.stream(CountingGroup(6), offers=True)
    with monkeypatch.context() as patch:
        patch.setattr(streams, part, no_memory)
        with pytest.raises(Ended) as ended:
            await first.hello()
    assert ended.value.code is grpc.StatusCode.UNKNOWN
    first.break_off()
    assert await peers.service.metric("environments") == 2
    second = await peers.service.joined(CountingGroup(6, stream_id="s2"))
    await second.play(1)
    await peers.healthy.play(1)


async def test_an_actor_that_owes_a_step_too_long_is_ended(nats: NatsRun) -> None:
    async with running_inference(nats, step_timeout=0.4) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        silent = service.stream(CountingGroup(1, stream_id="silent"))
        await silent.send(b"")
        stream = service.stream(CountingGroup(2))
        await stream.hello()
        await stream.play(2)
        with pytest.raises(Ended, match=r"no message came for 0\.4 s") as ended:
            await stream.receive()
        assert ended.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await service.counted("refused_messages_total", 1, reason="timeout")
        assert await service.metric("environments") == 0


async def test_an_actor_that_takes_no_answers_is_ended(nats: NatsRun) -> None:
    async with (
        running_inference(nats, step_timeout=1.0, max_environments=20_000) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        group = CountingGroup(20_000, role="eval")
        stream = await service.joined(group)
        group.advance()
        step = pb.ActRequest.FromString(group.step())
        for sequence in range(100):
            sending = asyncio.create_task(stream.send(step.SerializeToString()))
            await asyncio.wait([sending], timeout=0.5)
            if not sending.done():
                break
            step.step.sequence, step.step.is_first = sequence + 1, bytes(group.rows)
        await service.counted("refused_messages_total", 1, reason="timeout")
        assert await service.metric("streams") == 0
        stream.break_off()
        await asyncio.gather(sending, return_exceptions=True)


async def test_actors_that_die_at_any_moment_leave_nothing_behind(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)

    async def short_life(number: int) -> None:
        stream = peers.service.stream(CountingGroup(1, seed=number, stream_id=f"s{number}"))
        living = asyncio.create_task(_live(stream))
        await asyncio.wait([living], timeout=0.1 * rng.random())
        stream.break_off()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)

    for turn in range(20):
        await asyncio.gather(*(short_life(6 * turn + each) for each in range(6)), peers.healthy.play(2))
    await peers.service.counted("streams", 1)
    assert await peers.service.metric("environments") == 2
    assert (await peers.service.status())["discarded_steps"] > 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def _live(stream: ActorStream) -> None:
    await stream.hello()
    await stream.play(3)  # less than a chunk: there is no learner


async def test_a_call_without_a_hello_is_ended_too(nats: NatsRun) -> None:
    async with running_inference(nats, step_timeout=0.3) as service:
        call: Any = service.channel.stream_stream("/seedrl.v1.Inference/Act")()
        async with asyncio.timeout(5):
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_row_too_large_for_a_message_is_refused_before_it_makes_the_spec(nats: NatsRun) -> None:
    async with (
        running_inference(nats, network="mlp", unroll=40) as service,
        learner_side(nats, SPEC) as learner,
    ):
        with pytest.raises(Ended, match="shorten the unroll") as ended:
            await service.stream(CountingGroup(1)).hello(observation=to_proto_observation(LARGE))
        assert ended.value.code is grpc.StatusCode.INVALID_ARGUMENT
        await service.joined(CountingGroup(1, stream_id="s2"))
        assert learner.bus.is_connected
