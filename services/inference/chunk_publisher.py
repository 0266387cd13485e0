"""Brings finished chunks to the work queue, in order within a stream; retries until they are kept."""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Self

from services.inference.assembler import Cut
from services.inference.metrics import InferenceMetrics
from services.inference.pace import Pace
from services.inference.td_errors import completed
from shared.bus.connection import Bus
from shared.bus.key_values import LEARNER_LEASE, lease_owner
from shared.bus.work_queue import has_room, publish_chunk
from shared.errors import ConnectionFailed, QueueFull
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.telemetry import get_logger
from shared.types import Chunk
from shared.wire.chunks import encode_chunk, slice_rows

_FIRST_BACKOFF_SECONDS = 0.005
_LONGEST_BACKOFF_SECONDS = 0.05  # once there is room
_LONGEST_REFUSED_SECONDS = 1.0  # where NATS answers with an error, to the whole message each time
# Between two looks at a full queue, which the server answers at some cost.
_FIRST_LOOK_SECONDS, _LEAST_LOOK_SECONDS, _MOST_LOOK_SECONDS = 0.1, 0.02, 0.4
_ENCODERS = 2
_HOPELESS_SECONDS = 2.0  # without progress, while the run has a learner
_UNREAD_SECONDS = 0.2  # while it has none

log = get_logger(__name__)


class ChunkPublisher:
    """Encodes in threads and publishes one message at a time, so that there is one who retries.

    A stream hands over its next chunk only when the one before the last is acknowledged, so at most two per
    live stream are held. What ended streams left is published, too; `rows` tells who admits new ones how
    much waits. As an async context manager it gives up, on leaving, what is not published by then.
    """

    def __init__(
        self, bus: Bus, metrics: InferenceMetrics, *, ensure_queue: Callable[[], Awaitable[None]]
    ) -> None:
        self._bus = bus
        self._metrics = metrics
        self._ensure_queue = ensure_queue
        self._turn = asyncio.Lock()
        self._looks = Pace(first=_FIRST_LOOK_SECONDS, least=_LEAST_LOOK_SECONDS, most=_MOST_LOOK_SECONDS)
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="encode")
        self._running: set[asyncio.Task[None]] = set()
        self.rows = 0  # of all chunks that are not acknowledged yet
        self.is_full = False  # the queue was, when the newest message first came to it
        self.trouble: str | None = None  # why NATS, being there, does not keep the message that waits
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._give_up()
        finally:
            self._encoders.shutdown(wait=True)

    async def failed(self) -> None:
        """Raises what publishing raised for good; waits for ever while it raises nothing."""
        await self._failure

    @property
    def queued(self) -> int:
        """Chunks that are not acknowledged yet."""
        return len(self._running)

    def submit(
        self, cut: Cut, spec: RunSpec, *, rows_per_message: int, after: "asyncio.Task[None] | None"
    ) -> "asyncio.Task[None]":
        """Publishes the chunk once `after` has ended; the task ends with the last acknowledgement."""
        job = _Job(cut, spec, rows_per_message)
        task = asyncio.create_task(self._publish(job, after))
        self._running.add(task)
        self.rows += job.rows
        self._metrics.queued_publishes.set(len(self._running))
        task.add_done_callback(partial(self._on_end, job))
        return task

    async def drain(self, seconds: float) -> None:
        """Waits until everything is published, `seconds` at most; gives up what makes no progress."""
        deadline = asyncio.get_running_loop().time() + seconds
        patience = _HOPELESS_SECONDS if await self._is_read() else _UNREAD_SECONDS
        while self._running:
            before, left = self._metrics.chunks_published.total, deadline - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait(
                self._running, timeout=min(left, patience), return_when=asyncio.FIRST_COMPLETED
            )
            if left <= 0 or (not done and self._metrics.chunks_published.total == before):
                log.warning("chunks not published", chunks=len(self._running))
                await self._give_up()

    async def _is_read(self) -> bool:
        """Whether the run has a learner, as far as can be told."""
        try:
            async with asyncio.timeout(_UNREAD_SECONDS):
                return await lease_owner(self._bus, LEARNER_LEASE) is not None
        except (ConnectionFailed, TimeoutError):
            return True

    async def _give_up(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def _on_end(self, job: "_Job", task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self.rows -= job.rows
        self._metrics.queued_publishes.set(len(self._running))
        self._metrics.discarded_steps.add(job.unpublished_steps)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _publish(self, job: "_Job", after: "asyncio.Task[None] | None") -> None:
        messages = await in_thread(job.encoded, self._encoders)
        if after is not None:
            await asyncio.wait([after])
        for (message_id, steps), message in zip(job.parts, messages, strict=True):
            await self._persist(message, message_id)
            job.unpublished_steps -= steps

    async def _persist(self, message: bytes, message_id: str) -> None:
        async with self._turn:
            backoff = _FIRST_BACKOFF_SECONDS
            was_full = False
            while True:
                longest = _LONGEST_BACKOFF_SECONDS
                try:
                    await publish_chunk(self._bus, message, message_id)
                except QueueFull:
                    self.is_full = was_full = True
                    self.trouble = None  # NATS answers again
                    self._metrics.publish_retries.labels("full").inc()
                    await self._room()
                except ConnectionFailed as error:
                    longest = _LONGEST_REFUSED_SECONDS
                    self._metrics.publish_retries.labels("connection").inc()
                    self._complain(error)
                    await self._ensure_queue()  # once there is a connection; the server may have lost it
                else:
                    self._metrics.chunks_published.add(1)
                    self.is_full = was_full
                    self.trouble = None
                    return
                backoff = min(backoff, longest)
                await asyncio.sleep(backoff)
                backoff *= 2

    def _complain(self, error: ConnectionFailed) -> None:
        """Says once per outage what else only NATS' own log tells; a lost connection is said elsewhere."""
        if self._bus.is_connected and self.trouble is None:
            self.trouble = str(error)
            log.warning("NATS keeps no chunks; see its log, its disk may be full", reason=self.trouble)

    async def _room(self) -> None:
        """Waits until the queue has room, or cannot be asked."""
        began = monotonic()
        with suppress(ConnectionFailed):
            while True:
                await asyncio.sleep(self._looks.seconds)
                if await has_room(self._bus):
                    self._looks.waited(monotonic() - began)
                    return


class _Job:
    """A chunk on its way, cut into the rows of one message each; once encoded, only its accounts."""

    def __init__(self, cut: Cut, spec: RunSpec, rows_per_message: int) -> None:
        self._cut: Cut | None = cut
        self._spec = spec
        self._rows_per_message = rows_per_message
        self.rows = cut.chunk.rows
        self.parts = [(_message_id(part), part.steps) for part in _parts(cut.chunk, rows_per_message)]
        self.unpublished_steps = cut.chunk.steps

    def encoded(self) -> list[bytes]:
        """One message per part, once; what takes time happens here, off the event loop."""
        assert self._cut is not None, "a chunk is encoded once"
        parts = _parts(completed(self._cut, self._spec), self._rows_per_message)
        self._cut = None
        return [encode_chunk(part) for part in parts]


def even_parts(group_size: int, most: int) -> list[int]:
    """Rows of a group's messages when each holds `most` at most; they differ by one at most.

    A queue full of small rests could hold less than a batch, and then neither the learner nor inference could
    go on; one that is large enough for rests alone holds much more than it should.
    """
    messages = math.ceil(group_size / most)
    return [(group_size + number) // messages for number in range(messages)]


def _parts(chunk: Chunk, most: int) -> list[Chunk]:
    ends = list(itertools.accumulate(even_parts(chunk.rows, most)))
    return [slice_rows(chunk, start, end) for start, end in itertools.pairwise([0, *ends])]


def _message_id(part: Chunk) -> str:
    header = part.header
    return f"{header.stream_id}/{header.number}/{header.first_row}"
