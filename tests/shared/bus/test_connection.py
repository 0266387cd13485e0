import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import nats.errors
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from services.nats_server import MAX_PAYLOAD_BYTES
from shared.addresses import free_port
from shared.bus import connection
from shared.bus.connection import connected_bus, validated_urls
from shared.config import NatsSettings
from shared.errors import ConfigurationError, ConnectionFailed, Refused
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

NOBODY = "nats://127.0.0.1:9"


def settings(url: str, *, timeout: float = 5.0) -> NatsSettings:
    return NatsSettings.model_validate({"nats_url": url, "connect_timeout": timeout})


@asynccontextmanager
async def answering(words: bytes) -> AsyncIterator[str]:
    """The URL of a TCP server that is no NATS server."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("patient", [True, False])
async def test_a_block_starts_connected_where_there_is_a_server(nats: NatsRun, patient: bool) -> None:
    async with nats.bus(patient=patient) as bus:
        assert bus.is_connected
        assert bus.run_id == nats.run_id
        assert bus.max_payload == 8 * 2**20 - connection.HEADER_BYTES


async def test_a_command_gives_up_on_a_server_that_is_away() -> None:
    started = time.monotonic()
    with pytest.raises(
        ConnectionFailed, match=r"no NATS server at nats://127.0.0.1:9 within 0.3 s: Connection refused"
    ):
        async with connected_bus(settings(NOBODY, timeout=0.3), run_id="r", name="t", patient=False):
            pass
    assert time.monotonic() - started < 2


async def test_a_service_starts_without_a_server_and_finds_it_when_it_comes(own_nats: OwnNats) -> None:
    await own_nats.stop()
    async with own_nats.bus() as bus:
        assert not bus.is_connected
        with pytest.raises(ConnectionFailed, match="not connected"):
            _ = bus.max_payload
        await own_nats.start()
        await asyncio.wait_for(bus.connected(), 10)
        assert bus.is_connected
        assert bus.max_payload == MAX_PAYLOAD_BYTES - connection.HEADER_BYTES


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("token", ["wrong-secret", None])
async def test_a_wrong_token_is_refused_at_once(nats: NatsRun, patient: bool, token: str | None) -> None:
    wrong = nats.settings.model_copy(update={"nats_token": SecretStr(token) if token else None})
    started = time.monotonic()
    with pytest.raises(Refused, match="refuses the token") as caught:
        async with connected_bus(wrong, run_id="r", name="t", patient=patient):
            await asyncio.Event().wait()
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 2


async def test_a_token_that_is_refused_after_a_restart_ends_the_block(own_nats: OwnNats) -> None:
    async def block() -> None:
        async with own_nats.bus():
            await own_nats.stop()
            own_nats.token = "another"
            await own_nats.start()
            await asyncio.wait_for(asyncio.Event().wait(), 10)

    with pytest.raises(Refused, match="refuses the token"):
        await block()


@pytest.mark.parametrize(
    "url",
    [
        "no url",
        "",
        "http://here:1",
        "nats://",
        "nats://:4222",
        "nats://a..b:1",
        "nats://a:port",
        "nats://a:70000",
        "nats://a:1/x",
        "nats://[::1",
        "nats://good:1,bad host",
    ],
)
async def test_a_malformed_url_is_a_mistake_in_the_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is no NATS URL"):
        async with connected_bus(settings(url), run_id="r", name="t", patient=True):
            pass


def test_urls_may_be_short_or_several_and_are_shown_without_credentials() -> None:
    assert validated_urls("host:1") == ["nats://host:1"]
    assert validated_urls("nats://a:1, tls://b") == ["nats://a:1", "tls://b"]
    assert validated_urls("nats://me:secret@[::1]:4222") == ["nats://me:secret@[::1]:4222"]
    with pytest.raises(ConfigurationError) as caught:
        validated_urls("nats://me:secret@host:4222/path")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        validated_urls("nats://me:sec/ret@host:4222")
    assert "sec" not in str(caught.value)


async def test_credentials_in_the_address_are_percent_encoded(tmp_path: Path) -> None:
    port = free_port()
    words = ("-a", "127.0.0.1", "-p", str(port), "--user", "sam@home", "--pass", "p@s/s:%41")
    server = Path(sys.executable).with_name("nats-server")
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(server, *words, stdout=log, stderr=log)
    try:
        url = f"nats://sam%40home:p%40s%2Fs%3A%2541@127.0.0.1:{port}"
        async with connected_bus(settings(url), run_id="r", name="t", patient=False) as bus:
            assert bus.is_connected
        wrong = settings(url.replace("%2541", "%2542"))
        with pytest.raises(Refused, match=r"refuses the token or credentials .*SEEDRL_NATS_URL"):
            async with connected_bus(wrong, run_id="r", name="t", patient=False):
                pass
    finally:
        process.kill()
        await process.wait()


async def test_a_token_in_the_address_is_percent_encoded(own_nats: OwnNats) -> None:
    await own_nats.stop()
    own_nats.token = "a@b/c"
    await own_nats.start()
    url = f"nats://a%40b%2Fc@127.0.0.1:{own_nats.port}"
    async with connected_bus(settings(url), run_id="r", name="t", patient=False) as bus:
        assert bus.is_connected


@pytest.mark.parametrize(
    "words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO nonsense\r\n", b"x" * 100_000]
)
async def test_a_server_that_speaks_something_else_is_no_nats_server(words: bytes) -> None:
    async with answering(words) as url:
        with pytest.raises(ConnectionFailed, match="no NATS server"):
            async with connected_bus(settings(url, timeout=0.5), run_id="r", name="t", patient=False):
                pass


async def test_an_outage_is_one_line_in_the_log_and_its_end_another(
    own_nats: OwnNats, capfd: pytest.CaptureFixture[str]
) -> None:
    with capture_logs() as logs:
        async with own_nats.bus() as bus:
            assert logs == []
            for _ in range(2):
                await own_nats.stop()
                await eventually(lambda: not bus.is_connected)
                await asyncio.sleep(1)  # time for several attempts to connect, none of which may be logged
                await own_nats.start()
                await asyncio.wait_for(bus.connected(), 10)
    assert [line["event"] for line in logs] == ["nats_lost", "nats_connected"] * 2
    assert all(line["server"] == own_nats.run.url for line in logs)
    assert capfd.readouterr().err == ""


async def test_a_server_that_is_away_at_the_start_is_one_line_in_the_log(own_nats: OwnNats) -> None:
    await own_nats.stop()
    with capture_logs() as logs:
        async with own_nats.bus() as bus:
            await asyncio.sleep(0.5)  # several attempts
            await own_nats.start()
            await asyncio.wait_for(bus.connected(), 10)
    assert [line["event"] for line in logs] == ["nats_unreachable", "nats_connected"]


async def test_a_command_leaves_it_to_its_error_to_say_that_the_server_is_away() -> None:
    with capture_logs() as logs, pytest.raises(ConnectionFailed):
        async with connected_bus(settings(NOBODY, timeout=0.3), run_id="r", name="t", patient=False):
            pass
    assert logs == []


@pytest.mark.parametrize("state", ["connected", "away", "never there", "frozen", "frozen with bytes unsent"])
async def test_closing_is_quick_and_leaves_no_task(own_nats: OwnNats, state: str) -> None:
    if state == "never there":
        await own_nats.stop()
    async with own_nats.bus() as bus:
        if state == "away":
            await own_nats.stop()
            await eventually(lambda: not bus.is_connected)
        elif state.startswith("frozen"):
            own_nats.freeze()
        if state.endswith("unsent"):
            for _ in range(8):
                await bus.nc.publish("somewhere", bytes(4 * 2**20))
            await asyncio.sleep(0.1)  # until the socket takes no more
        started = time.monotonic()
    assert time.monotonic() - started < 4
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@pytest.mark.parametrize("state", ["never there", "away"])
async def test_an_attempt_to_connect_that_swallows_its_cancellation_is_ended(
    own_nats: OwnNats, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `asyncio.wait_for` does when what it waits for fails at the same time."""
    if state == "never there":
        await own_nats.stop()
    async with own_nats.bus() as bus:
        trying = asyncio.Event()

        async def swallow_one(_: object) -> None:
            trying.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            raise ConnectionRefusedError

        monkeypatch.setattr(bus.nc, "_connect_to_server", swallow_one)
        if state == "away":
            await own_nats.stop()
        await asyncio.wait_for(trying.wait(), 10)
        started = time.monotonic()
    assert time.monotonic() - started < 4
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_request_ends_with_its_connection_not_at_its_timeout(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        heard = await bus.nc.subscribe("silent")
        asking = asyncio.create_task(bus.nc.request("silent", timeout=60))
        await heard.next_msg(timeout=10)
        await own_nats.kill()
        with pytest.raises(nats.errors.ConnectionReconnectingError):
            await asyncio.wait_for(asking, 5)


async def test_a_cancelled_request_ends_at_once(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        heard = await bus.nc.subscribe("silent")
        asking = asyncio.create_task(bus.nc.request("silent", timeout=60))
        await heard.next_msg(timeout=10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asking, 5)


async def test_a_peer_that_stands_still_is_noticed_and_found_again(
    own_nats: OwnNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PING_SECONDS", 0.1)
    monkeypatch.setattr(connection, "_ATTEMPT_SECONDS", 0.5)
    async with own_nats.bus() as bus:
        own_nats.freeze()
        for _ in range(8):
            await bus.nc.publish("somewhere", bytes(4 * 2**20))
        await eventually(lambda: not bus.is_connected, timeout=5)
        own_nats.thaw()
        await asyncio.wait_for(bus.connected(), 10)


async def test_a_connection_that_the_server_ends_for_good_ends_the_block(nats: NatsRun) -> None:
    async def block() -> None:
        async with nats.bus() as bus:
            too_large = bytes(bus.max_payload + connection.HEADER_BYTES)
            await bus.nc.publish("somewhere", too_large, headers={"a": "b"})
            await asyncio.wait_for(asyncio.Event().wait(), 10)

    with pytest.raises(ConnectionFailed, match="ended the connection: maximum payload violation"):
        await block()


async def test_the_largest_message_with_headers_is_delivered(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        subscription = await bus.nc.subscribe("large")
        data = bytes(bus.max_payload)
        await bus.nc.publish("large", data, headers={"Nats-Msg-Id": "x" * 900})
        assert len((await subscription.next_msg(timeout=10)).data) == len(data)


async def test_a_cancelled_block_ends_with_the_cancellation(nats: NatsRun) -> None:
    inside = asyncio.Event()

    async def block() -> None:
        async with nats.bus():
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_exception_of_the_block_leaves_it_as_it_is(nats: NatsRun) -> None:
    with pytest.raises(KeyError):
        async with nats.bus():
            raise KeyError


async def test_a_patient_bus_tries_again_and_complains_once(nats: NatsRun) -> None:
    async def operation() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise ConnectionFailed("not yet")
        return len(tries)

    tries: list[int] = []
    async with nats.bus() as bus:
        with capture_logs() as logs:
            assert await bus.persistently(operation) == 4
    assert [line["reason"] for line in logs] == ["not yet"]


async def test_an_impatient_bus_tries_once(nats: NatsRun) -> None:
    async def operation() -> None:
        raise ConnectionFailed("not yet")

    async with nats.bus(patient=False) as bus:
        with pytest.raises(ConnectionFailed, match="not yet"):
            await bus.persistently(operation)
