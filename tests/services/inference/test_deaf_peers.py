"""A peer that takes nothing more, as one behind a broken link: what is sent to it piles up, for it alone."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc

from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import ActorStream, learner_side, running_inference
from tests.support.nats import NatsRun

SPEC = counting_spec(unroll=4)
MANY = 40_000  # rows, whose answer of 320 kB fits neither a window of HTTP/2 nor the buffers below
TIMEOUT = 3.0


class Link:
    """Carries bytes between an actor and the service; `cut` stops those to the actor."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._service = port
        self._open = asyncio.Event()
        self._open.set()
        self._carrying: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        self._open.clear()

    @asynccontextmanager
    async def carrying(self) -> AsyncIterator["Link"]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._carrying:
                task.cancel()
            await asyncio.wait(self._carrying)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        near = socket.create_connection(("127.0.0.1", self._service))
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        back, to = await asyncio.open_connection(sock=near, limit=65536)
        always = asyncio.Event()
        always.set()
        with suppress(asyncio.CancelledError):  # asyncio would log the end of the test as an error
            await asyncio.gather(_copy(reader, to, always), _copy(back, writer, self._open))
        for each in (to, writer):
            each.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_open: asyncio.Event) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            await is_open.wait()
            writer.write(data)
            await writer.drain()


async def test_answers_that_nobody_takes_hold_nobody_up_and_free_their_slots_in_time(nats: NatsRun) -> None:
    async with (
        running_inference(nats, max_environments=MANY + 2, step_timeout=TIMEOUT) as service,
        learner_side(nats, SPEC) as learner,
        Link(service.config.port).carrying() as link,
        grpc.aio.insecure_channel(
            f"127.0.0.1:{link.port}", options=[("grpc.max_send_message_length", -1)]
        ) as channel,
    ):
        await learner.publish()
        deaf = ActorStream(channel, CountingGroup(MANY, stream_id="deaf", role="eval"), nats.run_id)
        await deaf.hello()
        await deaf.play(2)
        link.cut()
        await deaf.ask()
        alive = await service.joined(CountingGroup(2, role="eval"))
        await service.counted("rows_total", 3 * MANY, within=40)  # its answer is on the way
        async with asyncio.timeout(TIMEOUT):
            await alive.play(20)  # every batch waits for the deaf one, but not longer than it may
        async with asyncio.timeout(40):
            while await service.metric("environments") != 2:
                await alive.play(1)
        await alive.play(20)
        assert await service.metric("refused_messages_total", reason="timeout") == 1
        deaf.break_off()
