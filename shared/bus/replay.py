"""Asking the run's replay over NATS; `shared.bus.replay_serving` answers.

Who asks for a sample or a snapshot waits as long as it takes, and hears each second that it should. Every
such word, and every part of an answer, is confirmed: thus replay notices who went away and does not wait for
it, and sends no faster than is taken. A call that is tried again carries the number of the attempt; for a
sample it takes the place of the attempt before, while a snapshot may be written once for each.
"""

import asyncio
import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import nats.errors
import numpy as np
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from numpy.typing import NDArray

from shared.bus.client import ended
from shared.bus.connection import API_TIMEOUT_SECONDS, Bus
from shared.bus.trouble import trouble
from shared.errors import ChunkError, ConnectionFailed, ProtocolError, Refused
from shared.types import Array, Chunk
from shared.wire.chunk_rows import chunk_of_record
from shared.wire.replay import (
    MAX_BATCH_SIZE,
    Answer,
    Assembly,
    Request,
    decode_answer,
    decode_sample,
    encode_priorities,
    encode_request,
    is_part,
)

SILENCE_SECONDS = 10.0  # after which the other side is taken to be gone
_MAX_DAMAGED = 3
_PRIORITY_BYTES = 16
_PRIORITIES_HEAD_BYTES = 1024

log = structlog.get_logger(__name__)


class ReplaySample(NamedTuple):
    """Sequences that replay chose by their priorities."""

    keys: NDArray[np.uint64]  # [n], opaque: generation and slot
    probabilities: NDArray[np.float64]  # [n], P(i) when sampled
    size: int  # N, items in the table
    sequences: list[list[Chunk]]  # per item the chunks of its run in order, one row each


class ReplayClient:
    """Asks the run's replay; survives its restarts and those of NATS. Any number of calls at once.

    A patient bus tries until it works; otherwise ConnectionFailed.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def sample(self, batch_size: int) -> ReplaySample:
        """`batch_size` sequences; waits while replay withholds them.

        Raises Refused with the reason for what can never work, and ChunkError when what comes is damaged
        time and again.
        """
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise Refused(f"replay: a batch of {batch_size} sequences; 1 to {MAX_BATCH_SIZE:,} are possible")
        for damaged in itertools.count(1):
            answer = await self._asked(self._bus.subjects.replay_sample, batch_size)
            try:
                return await asyncio.to_thread(_decoded, answer, batch_size)
            except (ChunkError, ProtocolError) as error:
                log.warning("replay_sample_damaged", reason=str(error))
                if damaged == _MAX_DAMAGED:
                    raise ChunkError(f"replay: {damaged} samples in a row are damaged: {error}") from error
        raise AssertionError

    async def update_priorities(self, keys: NDArray[np.uint64], priorities: Array) -> None:
        """Returns once replay has them [n]. At least once; those of items that are gone change nothing.

        Raises Refused when they do not fit each other.
        """
        if np.ndim(keys) != 1 or np.shape(keys) != np.shape(priorities):
            raise Refused(f"replay: {np.shape(priorities)} priorities of {np.shape(keys)} keys")
        if self._bus.patient:
            await self._bus.connected()
        most = (self._bus.max_payload - _PRIORITIES_HEAD_BYTES) // _PRIORITY_BYTES
        for start in range(0, len(keys), most):
            some = slice(start, start + most)
            await self._update(encode_priorities(keys[some], priorities[some]))

    async def snapshot(self, name: str) -> dict[str, Any]:
        """Replay writes the snapshot `name`; its name, items, bytes and seconds. Raises Refused."""
        done = await self._asked(self._bus.subjects.replay_snapshot, name)
        if not isinstance(done, dict):
            raise Refused(f"replay: snapshot {name} is answered with {type(done).__name__}")
        return done

    async def _update(self, data: bytes) -> None:
        async def update() -> None:
            with trouble("replay"):
                subject = self._bus.subjects.replay_priorities
                answer = await self._bus.nc.request(subject, data, timeout=API_TIMEOUT_SECONDS)
            with _garbage_passes():
                _done(decode_answer(answer.data))

        await self._bus.persistently(update)

    async def _asked(self, subject: str, value: int | str) -> Any:
        """The answer: bytes where it came in parts."""
        call, attempts = secrets.token_hex(16), itertools.count()
        return await self._bus.persistently(
            lambda: self._attempt(subject, Request(call, next(attempts), value))
        )

    async def _attempt(self, subject: str, request: Request) -> Any:
        lost = self._bus.nc.lost
        inbox = self._bus.nc.new_inbox()  # of this attempt alone
        with trouble("replay"):
            subscription = await self._bus.nc.subscribe(inbox)
            try:
                await self._bus.nc.publish(subject, encode_request(request), reply=inbox)
                with _garbage_passes():
                    return await _answer(subscription, lost, Assembly(request))
            finally:
                with suppress(nats.errors.Error):
                    await subscription.unsubscribe()


async def _answer(subscription: Subscription, lost: "asyncio.Future[None]", assembly: Assembly) -> Any:
    while True:
        message = await _next(subscription, lost)
        if message.reply:
            await message.respond(b"")
        if not message.data:
            raise ConnectionFailed("replay: nobody there answers")
        if is_part(message.data):
            if (whole := assembly.add(message.data)) is not None:
                return whole
        elif (answer := decode_answer(message.data)).verdict != "waiting":
            return _done(answer)


async def _next(subscription: Subscription, lost: "asyncio.Future[None]") -> Msg:
    """The next message; raises ConnectionReconnectingError when the connection is lost before."""
    coming = asyncio.ensure_future(subscription.next_msg(timeout=SILENCE_SECONDS))
    try:
        ends: set[asyncio.Future[Any]] = {coming, lost}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise nats.errors.ConnectionReconnectingError
        return coming.result()
    finally:
        await ended(coming)


def _done(answer: Answer) -> Any:
    """What was done; raises Refused or ConnectionFailed where it was not."""
    verdict, value = answer
    if verdict == "refused":
        raise Refused(f"replay: {value}")
    if verdict != "done":
        raise ConnectionFailed(f"replay: {value}")
    return value


@contextmanager
def _garbage_passes() -> Iterator[None]:
    """An answer that is none is trouble with the connection: ask again."""
    try:
        yield
    except ProtocolError as error:
        raise ConnectionFailed(f"replay: {error}") from error


def _decoded(answer: Any, batch_size: int) -> ReplaySample:
    if not isinstance(answer, bytes):
        raise ProtocolError("a sample without its parts")
    keys, probabilities, size, rows = decode_sample(answer)
    if len(keys) != batch_size:
        raise ProtocolError(f"{len(keys)} sequences where {batch_size} were asked for")
    sequences = [[chunk_of_record(record) for record in records] for records in rows]
    return ReplaySample(keys, probabilities, size, sequences)
