import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import orjson
import pytest
from nats.errors import TimeoutError as NoAnswer
from structlog.testing import capture_logs

from shared.bus import weights
from shared.bus.connection import Bus
from shared.bus.streams import ensure_run, stream_info
from shared.bus.weights import Weights, WeightsReader, has_weights, publish_weights, watch_weights
from shared.errors import ConnectionFailed, Refused
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually


async def publish(bus: Bus, data: bytes = b"w", *, update: int = 0) -> int:
    return await publish_weights(bus, data, update=update, network_hash="hash")


async def next_of(watching: AsyncIterator[Weights], seconds: float = 10.0) -> Weights:
    return await asyncio.wait_for(anext(watching), seconds)


@pytest.mark.parametrize("size", [0, 1, 20_000, 2**22, 2**22 + 1, 17_000_000])
async def test_what_was_published_is_read(nats: NatsRun, size: int) -> None:
    data = os.urandom(size)
    async with nats.bus() as bus, nats.bus() as other:
        version = await publish(bus, data, update=7)
        assert await WeightsReader(other).newer_than(0) == Weights(version, 7, "hash", data)


async def test_a_version_counts_as_published_only_where_the_store_has_come_so_far(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus(run_id=f"{nats.run_id}-anew") as anew:
        assert not await has_weights(bus, 1)
        older = await publish(bus)
        newer = await publish(bus)
        assert await has_weights(bus, older)
        assert await has_weights(bus, newer)
        await publish(anew)  # as a store that was lost does, it begins with low versions
        assert not await has_weights(anew, newer)


async def test_there_is_nothing_newer_than_the_newest(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        reader = WeightsReader(bus)
        await ensure_run(bus)
        assert await reader.newer_than(0) is None
        version = await publish(bus)
        assert await reader.newer_than(version) is None
        later = await publish(bus)
        newer = await reader.newer_than(version)
        assert newer is not None
        assert newer.version == later > version


async def test_versions_grow_also_when_a_publisher_starts_again_from_an_older_update(nats: NatsRun) -> None:
    versions = []
    for update in (100, 3, 3):
        async with nats.bus() as bus:
            versions.append(await publish(bus, update=update))
    assert versions == sorted(set(versions))
    async with nats.bus() as bus:
        newest = await WeightsReader(bus).newer_than(versions[0])
        assert newest is not None
        assert (newest.version, newest.update) == (versions[-1], 3)


async def test_a_reader_is_not_misled_by_a_set_that_is_being_published(nats: NatsRun) -> None:
    """Parts of a newer set lie there without its manifest: the older set is read whole."""
    async with nats.bus() as bus:
        data = os.urandom(3 * 2**22)
        version = await publish(bus, data)
        for part in range(2):
            await bus.js.publish(bus.subjects.weights_part(part), b"newer")
        assert await WeightsReader(bus).newer_than(0) == Weights(version, 0, "hash", data)


async def test_a_set_whose_parts_were_replaced_is_read_again_when_it_is_whole(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await publish(bus, b"old")
        for _ in range(2):  # as if the next two publications were half done
            await bus.js.publish(bus.subjects.weights_part(0), b"half")
        reader = WeightsReader(bus)
        with capture_logs() as logs:
            assert await reader.newer_than(0) is None
        assert logs == []  # it is not damaged
        version = await publish(bus, b"new")
        assert await reader.newer_than(0) == Weights(version, 0, "hash", b"new")


async def test_a_set_that_is_replaced_while_it_is_read_is_passed_over_for_the_next(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        await publish(bus, b"0")
        read = other.js.get_msg
        published = []

        async def read_late(stream: str, seq: int | None = None, **options: object) -> object:
            if seq is not None and len(published) < 3:
                published.append(await publish(bus, b"%d" % len(published)))
                published.append(await publish(bus, b"%d" % len(published)))
            return await read(stream, seq=seq, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(other.js, "get_msg", read_late)
        newest = await WeightsReader(other).newer_than(0)
        assert newest is not None
        assert (newest.version, newest.data) == (published[-1], b"3")


async def test_every_set_read_is_whole_while_others_are_published(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        await publish(bus, bytes(9_000_000))

        async def publish_many() -> None:
            for update in range(1, 12):
                await publish(bus, bytes([update]) * 9_000_000, update=update)

        publishing = asyncio.create_task(publish_many())
        reader, version, seen = WeightsReader(other), 0, []
        while not publishing.done() or not seen or seen[-1] < 11:
            if (newer := await reader.newer_than(version)) is not None:
                assert newer.data == bytes([newer.update]) * 9_000_000
                version = newer.version
                seen.append(newer.update)
        await publishing
        assert seen == sorted(set(seen))


async def test_damaged_weights_are_never_returned(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await publish(bus, b"good")
        last = await bus.js.get_last_msg(bus.subjects.weights_stream, bus.subjects.weights_manifest)
        assert last.data is not None
        forged = {**orjson.loads(last.data), "sha256": "0" * 64}
        await bus.js.publish(bus.subjects.weights_manifest, orjson.dumps(forged))
        reader = WeightsReader(bus)
        with capture_logs() as logs:
            assert await reader.newer_than(0) is None
            assert await reader.newer_than(0) is None
        assert [line["event"] for line in logs] == ["weights_damaged"]
        await publish(bus, b"good again")
        newest = await reader.newer_than(0)
        assert newest is not None
        assert newest.data == b"good again"


async def test_another_format_version_is_refused(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        await bus.js.publish(bus.subjects.weights_manifest, b'{"format_version": 2}')
        with pytest.raises(Refused, match="format version 2, this program 1"):
            await WeightsReader(bus).newer_than(0)


@pytest.mark.parametrize(
    "gone", ["nothing", "all", "the manifest", "a part", "the newest manifest", "the stream"]
)
async def test_nats_has_the_weights_while_manifest_and_parts_lie_there(nats: NatsRun, gone: str) -> None:
    async with nats.bus() as bus:
        stream = bus.subjects.weights_stream
        assert not await has_weights(bus, 1)
        await publish(bus, bytes(2 * 2**22))
        version = await publish(bus, bytes(2 * 2**22))
        assert await has_weights(bus, version)
        match gone:
            case "all":
                await bus.js.purge_stream(stream)
            case "the manifest":
                await bus.js.purge_stream(stream, subject=bus.subjects.weights_manifest)
            case "a part":
                await bus.js.delete_msg(stream, version - 1)
            case "the newest manifest":
                await bus.js.delete_msg(stream, version)
            case "the stream":
                await bus.js.delete_stream(stream)
        assert await has_weights(bus, version) is (gone == "nothing")
        assert await has_weights(bus, await publish(bus))


async def test_watching_says_why_weights_cannot_be_read(nats: NatsRun) -> None:
    said: list[str] = []
    async with nats.bus() as bus, nats.bus() as other:
        await bus.js.delete_msg(bus.subjects.weights_stream, await publish(bus) - 1)
        async with aclosing(watch_weights(other, on_trouble=said.append)) as watching:
            waiting = asyncio.create_task(next_of(watching))
            await eventually(lambda: "NATS lost parts of them" in said)
            await publish(bus)
            await waiting
            assert said[-1] == ""


async def test_watching_says_why_it_could_not_look_only_until_it_can(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "POLL_SECONDS", 0.01)
    said: list[str] = []
    async with nats.bus() as bus, nats.bus() as other:
        await publish(bus)
        look = other.js.get_last_msg

        async def look_in_vain_once(*arguments: object, **options: object) -> object:
            if said == [""]:
                raise NoAnswer
            return await look(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(other.js, "get_last_msg", look_in_vain_once)
        async with aclosing(watch_weights(other, on_trouble=said.append)) as watching:
            await next_of(watching)
            waiting = asyncio.create_task(next_of(watching))
            await eventually(lambda: len(said) >= 3)
            await publish(bus)
            await waiting
    assert [bool(words) for words in said[:3]] == [False, True, False]


async def test_watching_rests_when_it_has_seen_what_it_was_woken_for(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_AFTER_WAKING_SECONDS", (0.0,))
    monkeypatch.setattr(weights, "POLL_SECONDS", 2.0)
    read, looks = WeightsReader.newer_than, []

    async def counted(reader: WeightsReader, version: int) -> Weights | None:
        looks.append(version)
        return await read(reader, version)

    monkeypatch.setattr(WeightsReader, "newer_than", counted)
    async with nats.bus() as bus, nats.bus() as other, aclosing(watch_weights(other)) as watching:
        waiting = asyncio.create_task(next_of(watching))
        await eventually(lambda: looks)
        version = await publish(bus)
        assert (await waiting).version == version
        waiting = asyncio.create_task(next_of(watching))
        for _ in range(20):  # as long as as many looks take
            assert await has_weights(bus, version)
        assert looks.count(version) < 8
        await publish(bus)
        await waiting


async def test_watching_yields_what_is_there_and_then_every_publication_at_once(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        await publish(bus, b"0")
        async with aclosing(watch_weights(other)) as watching:
            assert (await next_of(watching)).data == b"0"
            for number in range(5):
                waiting = asyncio.create_task(next_of(watching))
                await asyncio.sleep(0.02)  # it waits by now; nothing breaks if it does not
                started = time.monotonic()
                await publish(bus, b"%d" % number)
                assert (await waiting).data == b"%d" % number
                assert time.monotonic() - started < weights.POLL_SECONDS / 2


async def test_watching_leaves_out_what_was_replaced_meanwhile(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await publish(bus, update=1)
        async with aclosing(watch_weights(bus)) as watching:
            assert (await next_of(watching)).update == 1
            for update in (2, 3, 4):
                await publish(bus, update=update)
            assert (await next_of(watching)).update == 4


async def test_watching_finds_what_nobody_told_it_of(nats: NatsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The poll: a publication whose message did not reach the watcher."""
    async with nats.bus() as bus, nats.bus() as other:
        await publish(bus, update=1)
        subscribe = other.nc.subscribe

        async def deaf(subject: str, **options: object) -> object:
            unheard = "elsewhere" if subject == other.subjects.weights_manifest else subject
            return await subscribe(unheard, **options)  # type: ignore[arg-type]

        read, looks = WeightsReader.newer_than, []

        async def counted(reader: WeightsReader, version: int) -> Weights | None:
            looks.append(version)
            return await read(reader, version)

        monkeypatch.setattr(other.nc, "subscribe", deaf)
        monkeypatch.setattr(WeightsReader, "newer_than", counted)
        async with aclosing(watch_weights(other)) as watching:
            first = await next_of(watching)
            waiting = asyncio.create_task(next_of(watching))
            await eventually(lambda: looks.count(first.version) == 1)
            await asyncio.sleep(0.05)  # its answer was there: nothing newer
            await publish(bus, update=2)
            assert (await waiting).update == 2


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_watching_outlives_a_restart_of_the_server(own_nats: OwnNats, end: str) -> None:
    async with own_nats.bus() as bus, own_nats.bus() as other:
        await publish(bus, update=1)
        async with aclosing(watch_weights(other)) as watching:
            assert (await next_of(watching)).update == 1
            waiting = asyncio.create_task(next_of(watching, 30))
            await (own_nats.stop() if end == "stop" else own_nats.kill())
            await eventually(lambda: not bus.is_connected)
            with pytest.raises(ConnectionFailed):
                await publish(bus, update=2)
            await own_nats.start()
            await bus.connected()
            await publish(bus, update=3)
            assert (await waiting).update == 3


async def test_watching_goes_on_when_the_versions_begin_anew(nats: NatsRun) -> None:
    """A server that lost its store: the new versions are lower than the last one seen."""
    async with nats.bus() as bus:
        for _ in range(5):
            await publish(bus, update=1)
        async with aclosing(watch_weights(bus)) as watching:
            assert (await next_of(watching)).update == 1
            await bus.js.delete_stream(bus.subjects.weights_stream)
            await ensure_run(bus)
            await publish(bus, update=2)
            assert (await next_of(watching)).update == 2


async def test_watching_starts_before_there_is_a_stream(nats: NatsRun) -> None:
    async with nats.bus() as bus, aclosing(watch_weights(bus)) as watching:
        waiting = asyncio.create_task(next_of(watching))
        await asyncio.sleep(0)
        await publish(bus, update=1)
        assert (await waiting).update == 1


async def test_old_sets_do_not_pile_up(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        for _ in range(20):
            await publish(bus, bytes(1000))
        info = await stream_info(bus, bus.subjects.weights_stream)
        assert info is not None
        assert info.state.messages <= 4


async def test_large_sets_are_published_and_read_in_a_moment(nats: NatsRun) -> None:
    data = os.urandom(17_000_000)
    async with nats.bus() as bus, nats.bus() as other:
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            await publish(bus, data)
            assert await WeightsReader(other).newer_than(0) is not None
            seconds.append(time.monotonic() - started)
        assert min(seconds) < 3.0, seconds  # 0.3 on a free machine


async def test_two_runs_do_not_read_each_others_weights(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus(run_id=f"{nats.run_id}-2") as other:
        await ensure_run(other)
        await publish(bus)
        assert await WeightsReader(other).newer_than(0) is None
