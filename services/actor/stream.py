"""The connection to inference, and one stream over it; knows neither environments nor when to try again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc.aio import EOF  # type: ignore[attr-defined]  # missing in the stubs

from shared.certificates import trusting
from shared.errors import ProtocolError
from shared.wire import inference_pb2 as pb
from shared.wire.inference_pb2_grpc import InferenceStub
from shared.wire.limits import MAX_MESSAGE_BYTES, MIB
from shared.wire.pipes import Pipes

T = TypeVar("T")
Stub = InferenceStub

_HALF_CLOSE_SECONDS = 0.5  # how long a stream that is given up waits for the server to agree

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + MIB),  # the arrays, and what stands beside them
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + MIB),
    # A peer that vanished without a word is noticed after 10 + 10 s, also while a run is paused.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # one that hangs, whose system goes on answering for it
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own waits between attempts to connect come on top of ours; by default they grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # in spite of its name how long an attempt may take
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
)


class StreamEnded(Exception):
    """The stream ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = " ".join(details.split())


@contextlib.asynccontextmanager
async def connected(address: str, tls_ca: Path | None = None) -> AsyncIterator[InferenceStub]:
    """Stub of the inference service at `address`; connects when it is first used.

    `tls_ca`: speaks TLS, with whom these certificates vouch for. Raises ConfigurationError when it cannot be
    read.
    """
    if tls_ca is None:
        channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(address, _credentials(tls_ca), options=CHANNEL_OPTIONS)
    async with channel:
        yield InferenceStub(channel)


def _credentials(tls_ca: Path) -> grpc.ChannelCredentials:
    trusting("tls_ca", tls_ca)  # gRPC says nothing of certificates that are none
    return grpc.ssl_channel_credentials(tls_ca.read_bytes())


class InferenceStream:
    """One stream, as an async context manager; leaving it tells the server at once that no more will come.

    A cancelled `send` or `receive` leaves the call alive, so that it can be ended in good form: gRPC itself
    would abort it.
    """

    def __init__(self, stub: InferenceStub, *, token: str | None = None) -> None:
        """`token`: what inference asks for."""
        self._stub = stub
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self._writing: asyncio.Task[Any] | None = None
        self._reading: asyncio.Task[Any] | None = None
        self._pipes: Pipes | None = None

    async def __aenter__(self) -> Self:
        act: Any = self._stub.Act  # its stub knows the call with an iterator of requests only
        self._call = act(metadata=self._metadata)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(_HALF_CLOSE_SECONDS):
                await _settled(self._writing)
                await self._call.done_writing()
                await _settled(self._reading)
                while await self._call.read() is not EOF:  # the end comes after the last answer only
                    pass
        self._call.cancel()
        await _settled(self._writing)
        await _settled(self._reading)

    def use(self, pipes: Pipes | None) -> None:
        """Sends everything through `pipes` from now on, if any; how it ends the call says, as before."""
        self._pipes = pipes
        if pipes is not None:
            self._call.add_done_callback(lambda _: pipes.end())

    async def send(self, request: pb.ActRequest) -> None:
        """Sends a message. Raises StreamEnded; an end with OK shows at the next `receive`."""
        if self._pipes is not None:
            self._pipes.write(request.SerializeToString())
            return
        self._writing = asyncio.create_task(self._call.write(request))
        with contextlib.suppress(asyncio.InvalidStateError):  # the call is over; `receive` knows how
            await _unaborted(self._writing)

    async def receive(self) -> pb.ActResponse | None:
        """The next message, or None when the server ended the stream with OK.

        Raises StreamEnded, and ProtocolError when what came is no message.
        """
        if self._pipes is not None and (data := await self._pipes.read()) is not None:
            return _parsed(data)
        self._reading = asyncio.create_task(self._call.read())
        response = await _unaborted(self._reading)
        return None if response is EOF else response


def _parsed(data: bytes) -> pb.ActResponse:
    try:
        return pb.ActResponse.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"the pipe brought no ActResponse: {error}") from error


async def _settled(task: "asyncio.Task[Any] | None") -> None:
    """Waits for the end of a gRPC operation, however it ends."""
    if task is not None:
        await asyncio.gather(asyncio.shield(task), return_exceptions=True)


async def _unaborted(task: "asyncio.Task[T]") -> T:
    """The result of a gRPC operation, which goes on when the caller is cancelled. Raises StreamEnded."""
    try:
        return await asyncio.shield(task)
    except grpc.aio.AioRpcError as error:
        raise StreamEnded(error.code(), error.details() or "") from None
    except asyncio.CancelledError:
        this = asyncio.current_task()
        if task.cancelled() and this is not None and not this.cancelling():
            raise StreamEnded(grpc.StatusCode.CANCELLED, "the channel was closed") from None
        raise
