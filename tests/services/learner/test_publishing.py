"""Coalesced publishing, with a real server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.learner import publishing as module
from services.learner.publishing import Snapshot, WeightsPublisher
from shared.bus.beside import beside
from shared.bus.connection import Bus
from shared.bus.weights import Weights, WeightsReader
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually


class Source:
    """Weights that change with every update."""

    def __init__(self) -> None:
        self.update = 0
        self.journaled = asyncio.Event()
        self.journaled.set()
        self.snapshots = 0
        self.versions: list[int] = []  # that were said to be published

    async def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return Snapshot(b"weights %d" % self.update, self.update)

    async def is_journaled(self, update: int) -> None:
        await self.journaled.wait()


@asynccontextmanager
async def publishing(bus: Bus, source: Source, interval: float = 0.0) -> AsyncIterator[WeightsPublisher]:
    publisher = WeightsPublisher(
        bus,
        source.snapshot,
        journaled=source.is_journaled,
        on_version=source.versions.append,
        network_hash="h",
        interval_seconds=interval,
    )
    async with asyncio.timeout(20), beside(publisher.run()):
        yield publisher


async def newest(bus: Bus) -> Weights | None:
    return await WeightsReader(bus).newer_than(0)


async def test_the_newest_weights_arrive_and_versions_grow(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source, versions = Source(), []
        async with publishing(bus, source) as publisher:
            for update in range(3):
                source.update = update
                await publisher.published(update)
                versions.append(publisher.version)
        weights = await newest(bus)
        assert weights is not None
        assert (weights.data, weights.update, weights.version) == (b"weights 2", 2, versions[-1])
        assert versions == sorted(set(versions))
        assert source.versions[-1] == weights.version


async def test_updates_during_a_publication_are_published_as_one(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source) as publisher:
            await publisher.published(0)
            source.journaled.clear()
            for update in range(1, 100):
                source.update = update
                publisher.offer()
                await asyncio.sleep(0)
            source.journaled.set()
            await publisher.published(99)
        assert source.snapshots <= 4
        weights = await newest(bus)
        assert weights is not None
        assert weights.update == 99


async def test_the_wait_for_an_update_ends_with_a_later_one(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source = Source()
        source.update = 3
        async with publishing(bus, source) as publisher:
            await publisher.published(2)
        assert publisher.update == 3


async def test_after_each_publication_comes_a_pause_nine_times_as_long(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, clock = module.publish_weights, asyncio.get_running_loop().time
    began, ended = [], []

    async def publish_slowly(*arguments: Any, **options: Any) -> int:
        began.append(clock())
        await asyncio.sleep(0.03)  # what a publication takes at least
        version = await publish(*arguments, **options)
        ended.append(clock())
        return version

    monkeypatch.setattr(module, "publish_weights", publish_slowly)
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source) as publisher:
            for update in range(2):
                await publisher_reaches(publisher, source, update)
    assert began[1] - ended[0] >= 0.25


async def test_nothing_is_published_before_the_journal_knows_its_update(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source) as publisher:
            await publisher.published(0)
            source.journaled.clear()
            source.update = 1
            waiting = asyncio.ensure_future(publisher.published(1))
            await eventually(lambda: source.snapshots == 2)
            weights = await newest(bus)
            assert weights is not None
            assert weights.update == 0
            source.journaled.set()
            await waiting


async def test_the_interval_holds_back_until_the_end_hurries(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source, interval=3600.0) as publisher:
            publisher.offer()
            await eventually(lambda: publisher.update == 0)
            source.update = 1
            publisher.offer()
            await asyncio.sleep(0.05)
            assert source.snapshots == 1
            await publisher.published(1)
        assert source.snapshots == 2


async def test_after_a_servers_absence_weights_follow_at_once(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        source, clock = Source(), asyncio.get_running_loop().time
        async with publishing(bus, source) as publisher:
            await publisher_reaches(publisher, source, 0)
            await own_nats.kill()
            killed = clock()
            source.update = 1
            publisher.offer()
            await eventually(lambda: source.snapshots == 2)
            await own_nats.start()
            await eventually(lambda: publisher.update == 1)
            back = clock()
            await publisher_reaches(publisher, source, 2)
            assert clock() - back < min(4.0, 4.5 * (back - killed))  # not nine times the absence, at most 5 s


async def test_one_publication_that_took_long_holds_back_nothing(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        source, clock = Source(), asyncio.get_running_loop().time
        async with publishing(bus, source) as publisher:
            await publisher_reaches(publisher, source, 0)
            own_nats.freeze()
            source.update = 1
            publisher.offer()
            await eventually(lambda: source.snapshots == 2)
            await asyncio.sleep(1.0)
            own_nats.thaw()
            await eventually(lambda: publisher.update == 1)
            back = clock()
            await publisher_reaches(publisher, source, 2)
            assert clock() - back < 2.5  # not nine times as long, at most 5 s


async def test_weights_that_nats_lost_are_published_again(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its stream is there as before, and with it the sequences that it gave away."""
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.01)
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source) as publisher, beside(publisher.keep()):
            await publisher.published(0)
            await bus.js.purge_stream(bus.subjects.weights_stream)
            weights = await eventually(lambda: newest(bus))
            assert weights.data == b"weights 0"


async def test_why_nats_does_not_take_weights_is_known_until_it_does(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        source = Source()
        async with publishing(bus, source) as publisher:
            await publisher.published(0)
            info = await bus.js.stream_info(bus.subjects.weights_stream)
            await bus.js.update_stream(info.config.evolve(max_msg_size=1))
            source.update = 1
            publisher.offer()
            await eventually(lambda: publisher.trouble == "weights: message size exceeds maximum allowed")
            assert publisher.update == 0
            await bus.js.update_stream(info.config)
            await publisher.published(1)
            assert publisher.trouble == ""


async def publisher_reaches(publisher: WeightsPublisher, source: Source, update: int) -> None:
    """Offers `update` and waits until it is published, in its own time."""
    source.update = update
    publisher.offer()
    await eventually(lambda: publisher.update == update)
