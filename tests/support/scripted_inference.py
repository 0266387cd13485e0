"""A real gRPC inference server without a policy: it records what actors say and answers by script."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from shared.wire import inference_pb2 as pb
from shared.wire import pipes
from shared.wire.hello import environment_from_hello
from shared.wire.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from shared.wire.pipes import Pipes
from shared.wire.shared_memory import taken
from tests.support.waiting import eventually

Answer = NDArray[Any] | pb.ActResponse | None  # actions, or a whole message; None ends the stream
Script = Callable[["RecordedStream", pb.Step], Answer | Awaitable[Answer]]

_OPTIONS = (
    ("grpc.max_receive_message_length", 65 * 2**20),
    ("grpc.max_send_message_length", 65 * 2**20),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


@dataclass
class RecordedStream:
    """What came on one stream."""

    hello: pb.Hello | None = None
    steps: list[pb.Step] = field(default_factory=list)
    memory: list[NDArray[Any]] | None = None  # that was taken
    pipes: Pipes | None = None  # likewise
    end: str = ""  # how it ended: half-closed, cancelled, or what the script did

    @property
    def size(self) -> int:
        """B."""
        assert self.hello is not None
        return self.hello.group_size

    def observation(self, leaf: int = 0) -> NDArray[Any]:
        """[steps, B, …] of one leaf."""
        assert self.hello is not None
        spec = self.hello.observation[leaf]
        data = b"".join(step.observation[leaf] for step in self.steps)
        return np.frombuffer(data, np.dtype(spec.dtype)).reshape(len(self.steps), self.size, *spec.shape)

    def rewards(self) -> NDArray[np.float32]:
        """[steps, B]."""
        return np.frombuffer(b"".join(step.reward for step in self.steps), "<f4").reshape(-1, self.size)

    def flags(self, name: str) -> NDArray[np.bool_]:
        """[steps, B] of terminated, truncated or is_first."""
        data = b"".join(getattr(step, name) for step in self.steps)
        return np.frombuffer(data, np.uint8).astype(np.bool_).reshape(-1, self.size)


class ScriptedInference(InferenceServicer):
    """Answers every Step with zeros, unless told otherwise; what it is told may change at any time."""

    def __init__(self, *, run_id: str = "default", takes_pipes: bool = False) -> None:
        self.run_id = run_id
        self.takes_pipes = takes_pipes  # and the memory beside
        self.holds_pipes = False  # beyond the end of their stream
        self.streams: list[RecordedStream] = []
        self.script: Script = lambda stream, _: np.zeros(stream.size, np.int64)
        self.refuse: tuple[grpc.StatusCode, str] | None = None  # answers Hello
        self.reject: tuple[grpc.StatusCode, str] | None = None  # answers every Step
        self.reject_from = 0  # but so many at first
        self.welcome: pb.ActResponse | None = None  # answers Hello instead of the right one
        self.takes_memory = False  # what is left there is recorded as if it had come in the message
        self.mute = False  # Hello is not answered at all
        self.end_after: int | None = None  # Steps after which a stream ends with OK
        self.let_go = asyncio.Event()  # actions are withheld while it is not set
        self.let_go.set()
        self.keep_steps = True
        self.total_steps = 0
        self.port = 0
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens, the second time on the same port."""
        self._server = grpc.aio.server(options=_OPTIONS)
        add_InferenceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def die(self) -> None:
        """Ends all streams at once, without a word."""
        assert self._server is not None
        await self._server.stop(grace=None)

    async def steps(self, count: int, *, stream: int = -1, timeout: float = 20) -> RecordedStream:
        """Waits until a stream (default: the newest) has had so many Steps."""
        await eventually(
            lambda: self.streams and len(self.streams[stream].steps) >= count,
            timeout=timeout,
            what=f"{count} steps of stream {stream}",
        )
        return self.streams[stream]

    async def Act(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[pb.ActRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ActResponse]:
        """One stream by the script."""
        stream = RecordedStream()
        self.streams.append(stream)
        try:
            async for response in self._answers(stream, _requests(stream, request_iterator), context):
                if stream.pipes is not None and stream.steps:
                    stream.pipes.write(response.SerializeToString())
                else:
                    yield response
        except asyncio.CancelledError:
            stream.end = stream.end or "cancelled"
            raise
        finally:
            if stream.pipes is not None and not self.holds_pipes:
                stream.pipes.close()

    async def _answers(
        self,
        stream: RecordedStream,
        requests: AsyncIterator[pb.ActRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.ActResponse]:
        async for request in requests:
            if request.HasField("hello"):
                stream.hello = request.hello
                if self.refuse is not None:
                    await context.abort(*self.refuse)
                offer = request.hello.shared_memory
                if self.takes_memory or (self.takes_pipes and offer.requests_fd):
                    stream.memory = _taken(request.hello)
                if self.takes_pipes and offer.requests_fd:
                    stream.pipes = pipes.taken(
                        offer, group_size=stream.size, stream_id=request.hello.stream_id
                    )
                    assert stream.pipes is not None
                if not self.mute:
                    yield self.welcome or pb.ActResponse(
                        welcome=pb.Welcome(
                            protocol_version=1,
                            run_id=self.run_id,
                            shared_memory=stream.memory is not None,
                            pipes=stream.pipes is not None,
                        )
                    )
                continue
            self.total_steps += 1
            if stream.memory is not None:
                assert not request.step.observation
                request.step.observation.extend(leaf.tobytes() for leaf in stream.memory)
            stream.steps.append(request.step)
            if not self.keep_steps:
                del stream.steps[:-1]
            if self.reject is not None and len(stream.steps) > self.reject_from:
                await context.abort(*self.reject)
            await self.let_go.wait()
            if self.end_after is not None and len(stream.steps) >= self.end_after:
                stream.end = "over"
                return
            answer = self.script(stream, request.step)
            if inspect.isawaitable(answer):
                answer = await answer
            if answer is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the script ends this stream")
            if isinstance(answer, pb.ActResponse):
                yield answer
                continue
            yield pb.ActResponse(
                actions=pb.Actions(
                    sequence=request.step.sequence,
                    action=np.asarray(answer, "<i8").tobytes(),
                    weights_version=len(stream.steps),
                )
            )
        # gRPC ends the requests of an aborted call as if it had been half-closed, and cancels it right after.
        await asyncio.sleep(0.05)
        stream.end = "half-closed"


async def _requests(
    stream: RecordedStream, requests: AsyncIterator[pb.ActRequest]
) -> AsyncIterator[pb.ActRequest]:
    """What comes on the call, and after the Welcome through pipes if they were taken."""
    while stream.pipes is None:
        try:
            yield await anext(requests)
        except StopAsyncIteration:
            return
    while (data := await stream.pipes.read()) is not None:
        yield pb.ActRequest.FromString(data)


def _taken(hello: pb.Hello) -> list[NDArray[Any]]:
    leaves = taken(
        hello.shared_memory,
        environment_from_hello(hello),
        group_size=hello.group_size,
        stream_id=hello.stream_id,
    )
    assert leaves is not None
    return leaves


@asynccontextmanager
async def scripted_inference(**kwargs: Any) -> AsyncIterator[ScriptedInference]:
    """A running server."""
    server = ScriptedInference(**kwargs)
    await server.start()
    try:
        yield server
    finally:
        server.let_go.set()
        await server.die()
