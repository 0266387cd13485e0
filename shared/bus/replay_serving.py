"""Answering the clients of `shared.bus.replay` over NATS; knows nothing of tables and priorities."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import nats.errors
import numpy as np
from nats.aio.msg import Msg
from numpy.typing import NDArray

from shared.bus.beside import beside
from shared.bus.client import ended
from shared.bus.connection import Bus
from shared.bus.replay import SILENCE_SECONDS
from shared.errors import ConnectionFailed, SeedrlError
from shared.wire.replay import (
    Request,
    SampleAnswer,
    Verdict,
    decode_priorities,
    decode_sample_request,
    decode_snapshot_request,
    encode_answer,
    encode_sample,
    parts_of,
)

WAITING_SECONDS = 1.0
_PARTS_IN_FLIGHT = 8
_PART_BYTES = 4 * 2**20  # at most; the server cuts off who has 64 MB on the way (its max_pending)
_MAX_REQUESTS = 256

OnSample = Callable[[int], Awaitable[SampleAnswer]]
OnPriorities = Callable[[NDArray[np.uint64], NDArray[np.float64]], Awaitable[Any]]
OnSnapshot = Callable[[str], Awaitable[dict[str, Any]]]
OnRefusal = Callable[[str], None]


@asynccontextmanager
async def serve_replay(
    bus: Bus,
    *,
    on_sample: OnSample,
    on_priorities: OnPriorities,
    on_snapshot: OnSnapshot,
    on_refusal: OnRefusal,
) -> AsyncIterator[None]:
    """Answers ReplayClients while the block runs, also after NATS was away.

    `on_sample` may wait as long as it must; it is cancelled when who asked went away, or asked again. What
    the other two return is told to who asked (JSON); they are not cancelled before the block ends. Of what
    they raise, ConnectionFailed makes the client try again, any other SeedrlError refuses the request, and
    everything else ends the block. `on_refusal` hears in words of each request
    refused. More than 256 requests at once are told to come again.
    """
    async with beside(_Server(bus, on_sample, on_priorities, on_snapshot, on_refusal).run()):
        yield


class _Server:
    def __init__(
        self,
        bus: Bus,
        on_sample: OnSample,
        on_priorities: OnPriorities,
        on_snapshot: OnSnapshot,
        on_refusal: OnRefusal,
    ) -> None:
        self._bus = bus
        self._on_sample = on_sample
        self._on_priorities = on_priorities
        self._on_snapshot = on_snapshot
        self._on_refusal = on_refusal
        self._requests = 0
        self._newest: dict[str, tuple[int, asyncio.Task[None]]] = {}  # attempt by call

    async def run(self) -> None:
        """Serves until it is cancelled."""
        await self._bus.connected()
        subjects = self._bus.subjects
        handlers = {
            subjects.replay_sample: self._sample,
            subjects.replay_priorities: self._priorities,
            subjects.replay_snapshot: self._snapshot,
        }
        subscriptions = []
        async with asyncio.TaskGroup() as group:
            try:
                for subject, handler in handlers.items():
                    take = self._taking(group, handler)
                    subscriptions.append(await self._bus.nc.subscribe(subject, cb=take))
                await asyncio.Event().wait()
            finally:  # before the group, which takes no more tasks then
                for subscription in subscriptions:
                    with suppress(nats.errors.Error):
                        await subscription.unsubscribe()

    def _taking(
        self, group: asyncio.TaskGroup, handler: Callable[[Msg], Coroutine[Any, Any, None]]
    ) -> Callable[[Msg], Awaitable[None]]:
        async def take(message: Msg) -> None:
            if self._requests >= _MAX_REQUESTS:
                await self._say(message, "failed", f"{self._requests} requests wait")
                return
            self._requests += 1
            group.create_task(answer(message))

        async def answer(message: Msg) -> None:
            try:
                await handler(message)
            except ConnectionFailed as error:
                await self._say(message, "failed", str(error))
            except SeedrlError as error:
                self._on_refusal(str(error))
                await self._say(message, "refused", str(error))
            finally:
                self._requests -= 1

        return take

    async def _sample(self, message: Msg) -> None:
        request = decode_sample_request(message.data)
        me = asyncio.current_task()
        assert me is not None
        attempt, before = self._newest.get(request.call, (-1, me))
        if attempt >= request.attempt:
            return
        self._newest[request.call] = request.attempt, me
        if before is not me:
            before.cancel()
        try:
            await self._send_sample(message, request)
        finally:
            if self._newest.get(request.call) == (request.attempt, me):
                del self._newest[request.call]

    async def _send_sample(self, message: Msg, request: Request) -> None:
        sampling = asyncio.ensure_future(self._on_sample(int(request.value)))
        try:
            if not await self._waited(message, sampling):
                return
            answer = sampling.result()
        finally:
            await ended(sampling)
        data = await asyncio.to_thread(encode_sample, answer)
        parts = parts_of(data, request, min(self._bus.max_payload, _PART_BYTES))
        for start in range(0, len(parts), _PARTS_IN_FLIGHT):
            sending = (self._heard(message, part) for part in parts[start : start + _PARTS_IN_FLIGHT])
            if not all(await asyncio.gather(*sending)):
                return

    async def _priorities(self, message: Msg) -> None:
        await self._say(message, "done", await self._on_priorities(*decode_priorities(message.data)))

    async def _snapshot(self, message: Msg) -> None:
        request = decode_snapshot_request(message.data)
        writing = asyncio.ensure_future(self._on_snapshot(str(request.value)))
        try:
            await self._waited(message, writing)
            await asyncio.wait({writing})
            await self._say(message, "done", writing.result())
        finally:
            await ended(writing)

    async def _waited(self, message: Msg, work: "asyncio.Future[Any]") -> bool:
        """Whether `work` is done and who asked is still there."""
        while not (await asyncio.wait({work}, timeout=WAITING_SECONDS))[0]:
            if not await self._heard(message, encode_answer("waiting", "replay is at it")):
                return False
        return True

    async def _heard(self, message: Msg, data: bytes) -> bool:
        """Sends; whether it was received."""
        with suppress(nats.errors.Error, OSError):
            await self._bus.nc.request(message.reply, data, timeout=SILENCE_SECONDS)
            return True
        return False

    async def _say(self, message: Msg, verdict: Verdict, value: Any) -> None:
        if message.reply:
            with suppress(nats.errors.Error, OSError):
                await self._bus.nc.publish(message.reply, encode_answer(verdict, value))
