import asyncio

import pytest
from structlog.testing import capture_logs

from shared.bus.episodes import EpisodeConsumer, publish_episodes
from shared.bus.streams import ensure_run, stream_info
from shared.errors import ConnectionFailed
from tests.support.nats import NatsRun, OwnNats


def episode(number: int) -> dict[str, object]:
    return {"actor_id": "a", "row": number, "return": number / 2, "length": 10, "role": "train"}


async def test_episodes_arrive_in_order_and_once(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        await ensure_run(bus)
        await publish_episodes(bus, [episode(0), episode(1)])
        await publish_episodes(bus, [episode(2)])
        assert await EpisodeConsumer(bus).fetch(timeout=10) == [episode(0), episode(1), episode(2)]
        assert await EpisodeConsumer(other).fetch(timeout=0.2) == []  # also not by who comes next
        stream, consumer = bus.subjects.episodes_stream, bus.subjects.episodes_consumer
        info = await bus.js.consumer_info(stream, consumer)
        assert (info.num_pending, info.num_ack_pending) == (0, 0)


async def test_episodes_wait_for_their_consumer(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        consumer = EpisodeConsumer(bus)
        assert await consumer.fetch(timeout=0) == []
        await ensure_run(bus)
        await publish_episodes(bus, [episode(0)])
        assert await consumer.fetch(timeout=10) == [episode(0)]


async def test_episodes_sent_twice_are_kept_once(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        for _ in range(2):
            await publish_episodes(bus, [episode(0)], message_id="same")
        assert await EpisodeConsumer(bus).fetch(timeout=10) == [episode(0)]


async def test_more_episodes_than_a_message_holds_arrive_all(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        many = [{**episode(number), "task": "x" * 10_000} for number in range(2000)]
        await publish_episodes(bus, many)
        info = await stream_info(bus, bus.subjects.episodes_stream)
        assert info is not None
        assert info.state.messages > 1
        consumer, got = EpisodeConsumer(bus), []
        async with asyncio.timeout(20):
            while len(got) < len(many):
                got += await consumer.fetch(timeout=1)
        assert got == many


async def test_the_oldest_episodes_give_way(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        info = await stream_info(bus, bus.subjects.episodes_stream)
        assert info is not None
        assert (info.config.max_msgs, info.config.discard, info.config.retention) == (10_000, "old", "limits")


async def test_an_unreadable_message_is_logged_and_passed_over(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        for garbage in (b"\xff", b"[]", b'{"episodes": 3}', b"{}"):
            await bus.js.publish(bus.subjects.episodes, garbage)
        await publish_episodes(bus, [episode(0)])
        with capture_logs() as logs:
            assert await EpisodeConsumer(bus).fetch(timeout=10) == [episode(0)]
        assert [line["event"] for line in logs] == ["episodes_unreadable"] * 4


async def test_publishing_makes_the_stream_where_there_is_none(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        with pytest.raises(ConnectionFailed):
            await publish_episodes(bus, [episode(0)], message_id="same")
        await publish_episodes(bus, [episode(0)], message_id="same")
        assert await EpisodeConsumer(bus).fetch(timeout=10) == [episode(0)]


async def test_a_consumer_outlives_a_restart_of_the_server(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        await ensure_run(bus)
        fetching = asyncio.create_task(EpisodeConsumer(bus).fetch(timeout=60))
        await asyncio.sleep(0.1)  # it waits by now; nothing breaks if it does not
        await own_nats.kill()
        await own_nats.start()
        await bus.connected()
        await publish_episodes(bus, [episode(0)])
        assert await asyncio.wait_for(fetching, 15) == [episode(0)]
