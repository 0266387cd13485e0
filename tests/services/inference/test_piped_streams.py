"""Streams whose messages go through pipes, beside others whose go through gRPC; over a real service."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import ActorStream, Ended, InferenceRun, learner_side, running_inference
from tests.support.nats import NatsRun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")

SPEC = counting_spec(unroll=4)


@pytest.fixture
async def service(nats: NatsRun) -> AsyncIterator[InferenceRun]:
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            running_inference(nats, max_environments=20_000, step_timeout=2.0)
        )
        learner = await stack.enter_async_context(learner_side(nats, SPEC))
        await learner.publish()
        yield service


async def piped(service: InferenceRun, rows: int = 2, **kwargs: Any) -> ActorStream:
    stream = await service.joined(CountingGroup(rows, **kwargs), offers=True)
    assert stream.local.pipes is not None
    return stream


async def test_steps_go_through_pipes_and_become_the_chunks_that_they_are(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        stream, other = await piped(service), await service.joined(CountingGroup(3, seed=1, stream_id="s2"))
        await asyncio.gather(stream.play(13), other.play(13))
        await learner.check_chunks(6, stream.group, other.group)
        pipes = {each["stream_id"]: each["pipes"] for each in (await service.status())["streams"]}
    assert pipes == {"s1": True, "s2": False}


@pytest.mark.parametrize(
    ("sent", "reason", "words"),
    [
        ({"sequence": 5}, "sequence", "sequence is 5, expected 1"),
        ({"observation": [bytes(24)]}, "leaves", "observation has 1 leaves, expected 0; it lies in shared"),
        ({"reward": np.array([0.0, np.nan], "<f4").tobytes()}, "reward", "reward of row 1 is nan"),
    ],
)
async def test_a_bad_step_ends_its_stream_with_a_status(
    service: InferenceRun, sent: dict[str, Any], reason: str, words: str
) -> None:
    stream, other = await piped(service), await piped(service, stream_id="s2")
    await asyncio.gather(stream.play(1), other.play(1))
    stream.group.advance()
    await stream.send(stream.step(**sent))
    await refused(service, stream, reason=reason, words=words)
    await other.play(3)


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (b"\3\0\0\0\xff\xff\xff", "garbage", "not an ActRequest"),
        (b"\2\0\0\0xxx", "pipes", "the pipe brought 7 bytes, its message has 6"),
        (b"\xff\xff\xff\xff", "pipes", "the pipe brought 4 bytes, its message has 4294967299"),
        (bytes(70_000), "pipes", "the pipe brought"),
    ],
)
async def test_what_is_no_message_ends_its_stream_with_a_status(
    service: InferenceRun, data: bytes, reason: str, words: str
) -> None:
    stream = await piped(service)
    await stream.play(1)
    await asyncio.to_thread(write_all, stream, data)
    await refused(service, stream, reason=reason, words=words)


def write_all(stream: ActorStream, data: bytes) -> None:
    assert stream.local.pipes is not None
    descriptor = os.dup(stream.local.pipes._writes)
    os.set_blocking(descriptor, True)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        pass  # the service has seen enough
    finally:
        os.close(descriptor)


async def refused(service: InferenceRun, stream: ActorStream, *, reason: str, words: str) -> None:
    with pytest.raises(Ended, match=words) as ended:
        await stream.receive()
    assert ended.value.code is grpc.StatusCode.INVALID_ARGUMENT
    await service.counted("refused_messages_total", 1, reason=reason)


async def test_a_message_may_come_in_pieces(service: InferenceRun) -> None:
    stream = await piped(service)
    await stream.play(1)
    stream.group.advance()
    message = stream.step()
    data = len(message).to_bytes(4, "little") + message
    for piece in (data[:3], data[3:10]):
        write_all(stream, piece)
        assert (await service.status())["streams"][0]["steps"] == 0
    write_all(stream, data[10:])
    await stream.heard()
    await stream.play(2)


async def test_answers_that_nobody_takes_end_the_stream(service: InferenceRun) -> None:
    stream = await piped(service, rows=4_000, role="eval")
    other = await piped(service, stream_id="s2", role="eval")
    for asked in (1, 2, 3):  # two answers of 32,000 bytes fit into a pipe
        await stream.ask()
        stream.group.actions.append(np.zeros(4_000, np.int64))
        await service.counted("rows_total", 4_000 * asked)
    await service.counted("refused_messages_total", 1, reason="pipes")
    await other.play(3)


async def test_who_owes_a_step_too_long_is_told_so(service: InferenceRun) -> None:
    stream = await piped(service)
    await stream.play(1)
    with pytest.raises(Ended, match="no message came for 2 s") as ended:
        await stream.receive()
    assert ended.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("how", ["closes its pipes", "half-closes", "breaks off"])
async def test_who_leaves_frees_its_place_at_once(service: InferenceRun, how: str) -> None:
    stream = await piped(service)
    await stream.play(2)
    if how == "closes its pipes":
        stream.local.close()
    elif how == "half-closes":
        await stream.end()
    else:
        stream._call.cancel()
    await service.counted("streams", 0, within=1.5)
    assert await service.metric("environments") == 0


async def test_a_service_that_ends_says_so(service: InferenceRun) -> None:
    stream = await piped(service)
    await stream.play(1)
    await service.end()
    with pytest.raises(Ended) as ended:
        await stream.receive()
    assert ended.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_group_whose_answers_fit_no_pipe_uses_grpc(service: InferenceRun) -> None:
    stream = await service.joined(CountingGroup(9_000, role="eval"), offers=True)
    assert (stream.local.leaves is not None, stream.local.pipes) == (True, None)
    await stream.play(2)


async def test_streams_leave_no_descriptors_behind(service: InferenceRun) -> None:
    def pipes() -> int:
        return sum("pipe:[" in str(path.resolve()) for path in Path("/proc/self/fd").iterdir())

    before = pipes()
    for number in range(3):
        stream = await piped(service, stream_id=f"s{number}")
        await stream.play(1)
        assert pipes() == before + 4
        await stream.end()
    await service.counted("streams", 0)
    assert pipes() == before
