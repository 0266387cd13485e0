import asyncio
from typing import Any

import pytest

from services.inference import episode_publisher
from services.inference.episode_publisher import EpisodePublisher
from shared.bus.episodes import EpisodeConsumer
from shared.bus.streams import ensure_run, stream_info
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually


def episode(number: int) -> dict[str, Any]:
    return {"row": number, "return": 1.0}


async def test_episodes_of_a_moment_travel_together(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        publisher = EpisodePublisher(bus)
        running = asyncio.create_task(publisher.run())
        for number in range(50):
            publisher.add(episode(number))
        found = await EpisodeConsumer(bus).fetch(timeout=5.0, max_messages=1)
        assert found == [episode(number) for number in range(50)]
        running.cancel()


async def test_episodes_wait_for_nats(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        publisher = EpisodePublisher(bus)
        await own_nats.stop()
        publisher.add(episode(1))
        flushing = asyncio.create_task(publisher.flush())
        publisher.add(episode(2))
        await asyncio.wait([flushing], timeout=0.3)
        assert not flushing.done()
        await own_nats.start()
        await asyncio.wait_for(flushing, 10)
        await publisher.flush()
        consumer, found = EpisodeConsumer(bus), []
        while len(found) < 2:
            found += await consumer.fetch(timeout=5.0)
        assert found == [episode(1), episode(2)]


@pytest.mark.parametrize("had_come", [True, False])
async def test_what_is_on_its_way_when_publishing_is_cancelled_is_kept_once(
    own_nats: OwnNats, had_come: bool
) -> None:
    async with own_nats.bus() as bus:
        await ensure_run(bus)
        publisher = EpisodePublisher(bus)
        publisher.add(episode(1))
        own_nats.freeze()
        sent = bus.nc.stats["out_msgs"]
        flushing = asyncio.create_task(publisher.flush())
        await eventually(lambda: bus.nc.stats["out_msgs"] > sent)
        flushing.cancel()
        await asyncio.wait([flushing])
        if had_come:
            own_nats.thaw()
        else:
            await own_nats.kill()
            await own_nats.start()
        publisher.add(episode(2))
        await publisher.flush()
        info = await stream_info(bus, bus.subjects.episodes_stream)
        assert info is not None
        assert info.state.messages == 2
        assert await EpisodeConsumer(bus).fetch(timeout=5.0) == [episode(1), episode(2)]


async def test_of_too_many_episodes_the_newest_wait(nats: NatsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_publisher, "_MOST_WAITING", 3)
    async with nats.bus() as bus:
        publisher = EpisodePublisher(bus)
        for number in range(10):
            publisher.add(episode(number))
        await publisher.flush()
        assert await EpisodeConsumer(bus).fetch(timeout=5.0) == [episode(7), episode(8), episode(9)]
