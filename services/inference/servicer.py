"""The gRPC side of a stream: reads, writes and ends calls; what messages mean is decided elsewhere."""

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]

from services.inference.access import Access
from services.inference.agreement import Agreement
from services.inference.metrics import InferenceMetrics
from services.inference.refusal import Refusal
from services.inference.session import FRAMING_BYTES, Introduction, read_hello
from services.inference.streams import Stream, Streams
from shared.errors import ProtocolError, SeedrlError
from shared.telemetry import get_logger
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION
from shared.wire.limits import MAX_MESSAGE_BYTES
from shared.wire.pipes import Pipes

_MOST_DETAIL = 500  # characters of a status text, which travels in HTTP/2 headers

log = get_logger(__name__)


@dataclass(eq=False)
class _Call:
    """One running Act."""

    task: "asyncio.Task[Any]"
    owes_since: float | None = None  # monotonic; None while this service is the one to act
    ending: Refusal | None = None  # why this service ended it
    introduction: Introduction | None = None

    def end(self, why: Refusal) -> None:
        """Ends the call with a status; it takes effect wherever it waits."""
        if self.ending is None:
            self.ending = why
            self.task.cancel()


class InferenceServicer:
    """Serves Act. Messages come and go as bytes, so that garbage is counted and answered in words."""

    def __init__(
        self,
        agreement: Agreement,
        streams: Streams,
        metrics: InferenceMetrics,
        access: Access,
        *,
        run_id: str,
        step_timeout: float,
    ) -> None:
        self._agreement = agreement
        self._streams = streams
        self._metrics = metrics
        self._access = access
        self._run_id = run_id
        self._step_timeout = step_timeout
        self._calls: set[_Call] = set()
        self._closed: Refusal | None = None

    def close(self, why: Refusal) -> int:
        """Ends every call, and answers each that comes, with a status; the number of streams that ended."""
        self._closed = why
        streams = sum(call.introduction is not None for call in self._calls)
        for call in self._calls:
            call.end(why)
        return streams

    async def end_overdue(self) -> None:
        """Ends, for ever, the calls that owe a message for longer than the step timeout."""
        limit = self._step_timeout
        late = Refusal(
            "timeout", f"no message came for {limit:g} s (step_timeout)", status="DEADLINE_EXCEEDED"
        )
        while True:
            now = monotonic()
            for call in self._calls:
                if call.owes_since is not None and now - call.owes_since > limit:
                    call.end(late)
            await asyncio.sleep(min(1.0, limit / 10))

    async def act(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One call from its Hello to its end."""
        complaint = self._access.complaint(context.invocation_metadata() or (), context.peer())
        if complaint is not None:
            context.set_code(grpc.StatusCode.UNAUTHENTICATED)
            context.set_details(complaint)
            return
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task)
        self._calls.add(call)
        try:
            await self._serve(call, context)
        except Refusal as refusal:
            self._refused(call, refusal)
            _set_status(context, refusal)
        except asyncio.CancelledError:
            if call.ending is None:  # the actor left
                raise
            task.uncancel()
            if call.ending.reason == "timeout":
                self._refused(call, call.ending)
            _set_status(context, call.ending)
        except SeedrlError as error:
            log.error("hello failed", reason=str(error))
            _set_status(context, Refusal("unavailable", str(error), status="UNAVAILABLE"))
        finally:
            self._calls.discard(call)

    async def _serve(self, call: _Call, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        hello = await _exchanged(call, context, None)
        if hello is EOF:
            return
        if self._closed is not None:  # said now: gRPC's clients take a status before their Hello for INTERNAL
            raise self._closed
        introduction = read_hello(hello, run_id=self._run_id)
        self._streams.check(introduction)
        engine, rows = await self._agreement.join(introduction)
        async with self._streams.opened(introduction, engine, rows_per_message=rows) as stream:
            call.introduction = introduction
            log.info(
                "stream opened",
                **_who(introduction),
                environments=introduction.group_size,
                shared_memory=stream.group.shares_memory,
                pipes=stream.pipes is not None,
            )
            try:
                wire: _Wire = context if stream.pipes is None else _Piped(stream.pipes)
                step = await _exchanged(call, context, self._welcome(stream), reads=wire)
                while step is not EOF:
                    step = await _exchanged(call, wire, await stream.answer(step))
            finally:
                log.info("stream ended", **_who(introduction), steps=stream.group.steps)

    def _welcome(self, stream: Stream) -> bytes:
        welcome = pb.Welcome(
            protocol_version=PROTOCOL_VERSION,
            run_id=self._run_id,
            shared_memory=stream.group.shares_memory,
            pipes=stream.pipes is not None,
        )
        return pb.ActResponse(welcome=welcome).SerializeToString()

    def _refused(self, call: _Call, refusal: Refusal) -> None:
        if refusal.status == "OK":
            return
        self._metrics.refused_messages.labels(refusal.reason).inc()
        who = _who(call.introduction) if call.introduction else {}
        log.warning("stream refused", **who, status=refusal.status, reason=str(refusal))


class _Wire(Protocol):
    """What carries the messages of a stream: its call, or pipes."""

    async def write(self, message: bytes) -> None:
        """Sends one."""

    async def read(self) -> Any:
        """The actor's next one, or EOF."""


class _Piped:
    """A wire of pipes."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes

    async def write(self, message: bytes) -> None:
        self._pipes.write(message)

    async def read(self) -> Any:
        message = await self._pipes.read()
        return EOF if message is None else message


async def _exchanged(call: _Call, wire: _Wire, reply: bytes | None, *, reads: _Wire | None = None) -> Any:
    """The actor's next message, or EOF, once it has taken `reply`; meanwhile it is the actor who owes.

    `reads`: whence that message comes, if not from where the reply goes.
    """
    call.owes_since = monotonic()
    try:
        if reply is not None:
            await wire.write(reply)
        message = await (reads or wire).read()
    except ProtocolError as error:
        raise Refusal("pipes", str(error)) from error
    call.owes_since = None
    if message is not EOF and len(message) > MAX_MESSAGE_BYTES + FRAMING_BYTES:
        size = f"message has {len(message)} bytes, larger than max {MAX_MESSAGE_BYTES}"
        raise Refusal("size", size, status="RESOURCE_EXHAUSTED")
    return message


def _set_status(context: grpc.aio.ServicerContext[Any, Any], refusal: Refusal) -> None:
    context.set_code(getattr(grpc.StatusCode, refusal.status))
    context.set_details(str(refusal)[:_MOST_DETAIL])


def _who(introduction: Introduction) -> dict[str, Any]:
    return {
        "actor_id": introduction.actor_id,
        "stream_id": introduction.stream_id,
        "task": introduction.task,
        "role": introduction.role,
    }
