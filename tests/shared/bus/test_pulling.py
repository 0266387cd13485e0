import asyncio
import time

import pytest
from nats.aio.msg import Msg
from structlog.testing import capture_logs

from shared.bus import pulling
from shared.bus.work_queue import (
    QueueConsumer,
    QueueState,
    ensure_queue,
    publish_chunk,
    queue_state,
)
from shared.errors import ConnectionFailed
from tests.support.nats import NatsRun, OwnNats
from tests.support.queue import fetch_all, is_waiting
from tests.support.waiting import eventually


async def test_large_messages_are_not_dropped(nats: NatsRun) -> None:
    """More waits than the client's limits for a subscription and the server's for a connection allow."""
    async with nats.bus() as bus:
        count, data = 18, bytes(bus.max_payload)
        await ensure_queue(bus, count)
        for i in range(count):
            await publish_chunk(bus, data, f"m/{i}")
        with capture_logs() as logs:
            messages = await fetch_all(QueueConsumer(bus), count)
        assert [message.sequence for message in messages] == list(range(1, count + 1))
        assert all(len(message.data) == len(data) for message in messages)
        assert logs == []  # the server cuts the connection of who lets too much wait
        for message in messages:
            await message.ack()


async def test_fetching_returns_what_is_there_without_waiting_for_more(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for i in range(3):
            await publish_chunk(bus, b"", f"m/{i}")
        async with asyncio.timeout(10):
            assert len(await QueueConsumer(bus).fetch(10, timeout=60)) == 3


async def test_fetching_returns_the_first_message_that_comes(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        consumer = QueueConsumer(bus)
        assert await consumer.fetch(10, timeout=0) == []
        fetching = asyncio.create_task(consumer.fetch(10, timeout=60))
        await eventually(lambda: is_waiting(bus))
        await publish_chunk(bus, b"", "m")
        assert len(await asyncio.wait_for(fetching, 10)) == 1


async def test_fetching_gives_up_in_time(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        consumer = QueueConsumer(bus)
        for timeout in (0.0, 0.3):
            started = time.monotonic()
            assert await consumer.fetch(10, timeout) == []
            assert timeout <= time.monotonic() - started < timeout + 5


async def test_a_consumer_waits_for_a_queue_that_is_not_there_yet(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        consumer = QueueConsumer(bus)
        assert await consumer.fetch(1, timeout=0.1) == []
        fetching = asyncio.create_task(consumer.fetch(1, timeout=30))
        await ensure_queue(bus, 1)
        await publish_chunk(bus, b"", "m")
        assert len(await asyncio.wait_for(fetching, 10)) == 1


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Msg]:
    """The messages that arrive; the server's word that there are no more does not."""
    hear, heard = pulling._Inbox._on_message, []

    async def hear_messages_only(inbox: pulling._Inbox, message: Msg) -> None:
        if message.reply:
            await hear(inbox, message)
            heard.append(message)

    monkeypatch.setattr(pulling._Inbox, "_on_message", hear_messages_only)
    return heard


async def test_what_a_cancelled_fetch_had_received_comes_again_at_once(
    nats: NatsRun, heard: list[Msg], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for i in range(3):
            await publish_chunk(bus, b"", f"m/{i}")
        consumer = QueueConsumer(bus)
        fetching = asyncio.create_task(consumer.fetch(5, timeout=60))
        await eventually(lambda: len(heard) == 3)
        fetching.cancel()
        await asyncio.wait({fetching})
        assert fetching.cancelled()
        monkeypatch.undo()
        messages = await asyncio.wait_for(fetch_all(consumer, 3), 5)  # not after ack_wait
        assert sorted(message.sequence for message in messages) == [1, 2, 3]


async def test_what_arrived_before_the_server_went_away_is_returned(
    own_nats: OwnNats, heard: list[Msg]
) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 10)
        for i in range(3):
            await publish_chunk(bus, b"", f"m/{i}")
        fetching = asyncio.create_task(QueueConsumer(bus).fetch(5, timeout=60))
        await eventually(lambda: len(heard) == 3)
        await own_nats.kill()
        messages = await asyncio.wait_for(fetching, 10)
        assert [message.sequence for message in messages] == [1, 2, 3]


async def test_nothing_is_lost_by_a_cancellation_at_any_point(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for i in range(3):
            await publish_chunk(bus, b"", f"m/{i}")
        # What was on its way when its inbox closed nobody can give back: it comes again after ack_wait.
        consumer = QueueConsumer(bus, ack_wait=1)
        for steps in range(0, 400, 10):
            fetching = asyncio.create_task(consumer.fetch(5, timeout=60))
            for _ in range(steps):
                await asyncio.sleep(0)
            fetching.cancel()
            await asyncio.wait({fetching})
            if not fetching.cancelled():
                for message in fetching.result():
                    await message.nak()
        messages = await asyncio.wait_for(fetch_all(consumer, 3), 10)
        assert sorted(message.sequence for message in messages) == [1, 2, 3]


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_everything_survives_a_restart_of_the_server(own_nats: OwnNats, end: str) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 3)
        for i in range(2):
            await publish_chunk(bus, b"%d" % i, f"m/{i}")
        consumer = QueueConsumer(bus)
        (held,) = await fetch_all(consumer, 1)
        fetching = asyncio.create_task(consumer.fetch(1, timeout=60))
        (other,) = await asyncio.wait_for(fetching, 10)
        waiting = asyncio.create_task(consumer.fetch(1, timeout=60))
        await eventually(lambda: is_waiting(bus))
        await (own_nats.stop() if end == "stop" else own_nats.kill())
        acknowledging = asyncio.create_task(held.ack())
        with pytest.raises(ConnectionFailed):
            await publish_chunk(bus, b"2", "m/2")
        await own_nats.start()
        await asyncio.wait_for(acknowledging, 10)
        assert await publish_chunk(bus, b"2", "m/2") == 3
        (message,) = await asyncio.wait_for(waiting, 15)
        assert message.data == b"2"
        await message.ack()
        await other.ack()
        assert await queue_state(bus) == QueueState(last_sequence=3, messages=0)


async def test_fetching_returns_in_time_while_the_server_is_away_or_stands_still(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 3)
        consumer = QueueConsumer(bus)
        assert await consumer.fetch(1, timeout=0.1) == []
        own_nats.freeze()
        for _ in range(2):
            started = time.monotonic()
            assert await consumer.fetch(1, timeout=0.2) == []
            assert time.monotonic() - started < 3
        own_nats.thaw()
        await publish_chunk(bus, b"", "m")
        assert len(await fetch_all(consumer, 1)) == 1
        await own_nats.kill()
        started = time.monotonic()
        assert await consumer.fetch(1, timeout=0.2) == []
        assert time.monotonic() - started < 3


async def test_a_consumer_that_was_removed_is_made_again(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"", "m/0")
        consumer = QueueConsumer(bus)
        (message,) = await fetch_all(consumer, 1)
        await bus.js.delete_consumer(bus.subjects.trajectories_stream, bus.subjects.trajectories_consumer)
        await asyncio.wait_for(message.ack(), 10)
        assert await queue_state(bus) == QueueState(last_sequence=1, messages=0)
        await publish_chunk(bus, b"1", "m/1")
        (message,) = await fetch_all(consumer, 1)
        await message.ack()
        assert await queue_state(bus) == QueueState(last_sequence=2, messages=0)
