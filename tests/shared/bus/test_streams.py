import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from nats.js import api

from shared.bus.streams import ensure_run, ensure_stream, run_bucket, stream_details, stream_info
from shared.errors import ConnectionFailed, Refused
from tests.support.nats import NatsRun, OwnNats


async def test_a_run_is_made_once_by_any_number_of_callers(nats: NatsRun) -> None:
    async with nats.bus() as one, nats.bus() as other:
        await asyncio.gather(*(ensure_run(bus) for bus in (one, other) * 3))
        await ensure_run(one)
        for stream in (one.subjects.weights_stream, one.subjects.episodes_stream):
            info = await stream_info(other, stream)
            assert info is not None
            assert info.config.storage == "file"
        await (await run_bucket(one)).put("key", b"value")
        assert (await (await run_bucket(other)).get("key")).value == b"value"


async def test_a_run_is_made_as_soon_as_there_is_a_server(own_nats: OwnNats) -> None:
    await own_nats.stop()
    async with own_nats.bus() as bus:
        making = asyncio.create_task(ensure_run(bus))
        await own_nats.start()
        await asyncio.wait_for(making, 10)
        assert await stream_info(bus, bus.subjects.weights_stream) is not None


async def test_a_run_survives_a_restart_of_the_server(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        await ensure_run(bus)
        await (await run_bucket(bus)).put("key", b"value")
        await own_nats.stop()
        await own_nats.start()
        await bus.connected()
        assert (await (await run_bucket(bus)).get("key")).value == b"value"


async def test_a_stream_that_is_configured_otherwise_is_left_as_it_is(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        config = api.StreamConfig(name=f"s-{nats.run_id}", subjects=[f"s.{nats.run_id}"], max_msgs=3)
        assert await ensure_stream(bus, config)
        assert await ensure_stream(bus, config)
        assert not await ensure_stream(bus, config.evolve(max_msgs=4))
        info = await stream_info(bus, f"s-{nats.run_id}")
        assert info is not None
        assert info.config.max_msgs == 3


async def test_a_stream_that_the_server_refuses_is_named_with_the_reason(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_run(bus)
        overlapping = api.StreamConfig(name=f"o-{nats.run_id}", subjects=[bus.subjects.episodes])
        with pytest.raises(Refused, match=f"stream o-{nats.run_id}: subjects overlap"):
            await ensure_stream(bus, overlapping)


async def test_there_is_no_information_about_a_stream_that_does_not_exist(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        assert await stream_info(bus, "nothing") is None
        assert await stream_details(bus, "nothing") is None


async def test_a_server_that_cannot_say_is_none_that_has_no_stream(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(*_: object, **__: object) -> Any:
        error = {"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}
        return SimpleNamespace(data=orjson.dumps({"error": error}))

    async with nats.bus() as bus:
        monkeypatch.setattr(bus.nc, "request", unavailable)
        with pytest.raises(ConnectionFailed, match="stream mine: JetStream system temporarily unavailable"):
            await stream_details(bus, "mine")
