import asyncio
import errno
import logging
import math
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from prometheus_client import Counter, Gauge, Histogram
from structlog.testing import capture_logs

from shared import http
from shared.config import HttpSettings
from shared.errors import ConfigurationError
from shared.http import new_registry, serving_http
from shared.telemetry import Progress
from tests.support.commands import ROOT
from tests.support.promtool import assert_clean_metrics

DEADLINE = 20.0

Serve = Callable[..., Any]


@asynccontextmanager
async def serving(
    *, watchdog_seconds: float = 60.0, **changes: Any
) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    """The base URL of a service's HTTP endpoints, and a client."""
    values: dict[str, Any] = {
        "service": "test",
        "is_ready": list,
        "status": dict,
        "registry": new_registry(),
        "progress": Progress(),
    }
    settings = HttpSettings(watchdog_seconds=watchdog_seconds)
    async with (
        serving_http(settings, **(values | changes)) as port,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE)) as client,
    ):
        yield f"http://127.0.0.1:{port}", client


async def get(url: str, client: aiohttp.ClientSession) -> tuple[int, Any]:
    async with client.get(url) as response:
        return response.status, await response.json()


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await check():  # noqa: ASYNC110 - what is awaited lies behind HTTP
            await asyncio.sleep(0.01)


async def test_a_service_that_makes_progress_is_healthy() -> None:
    progress = Progress()
    progress.beat("model thread")
    async with serving(progress=progress) as (url, client):
        assert await get(f"{url}/healthz", client) == (200, {"healthy": True, "reasons": []})


async def test_a_heartbeat_that_stops_makes_it_unhealthy_until_it_is_back() -> None:
    progress = Progress()
    progress.beat("model thread")
    with capture_logs() as logs:
        async with serving(progress=progress, watchdog_seconds=0.2) as (url, client):

            async def unhealthy() -> bool:
                status, body = await get(f"{url}/healthz", client)
                if status == 503:
                    assert body["healthy"] is False
                    assert body["reasons"][0].startswith("model thread made no progress for ")
                return status == 503

            async def logged() -> bool:
                return any(entry["event"] == "no progress" for entry in logs)

            await eventually(unhealthy)
            await eventually(logged)
            progress.beat("model thread")
            assert (await get(f"{url}/healthz", client))[0] == 200

        assert "test_http" in next(entry for entry in logs if entry["event"] == "no progress")["stack"]


async def test_an_ended_part_is_not_expected_to_make_progress() -> None:
    progress = Progress()
    progress.beat("warm-up")
    progress.forget("warm-up")
    async with serving(progress=progress, watchdog_seconds=1.0) as (url, client):
        await asyncio.sleep(1.2)  # longer than it may be silent
        assert (await get(f"{url}/healthz", client))[0] == 200


async def test_a_blocked_event_loop_is_logged_while_it_is_blocked() -> None:
    with capture_logs() as logs:
        async with serving(watchdog_seconds=0.2):
            deadline = time.monotonic() + DEADLINE
            while not any(entry["event"] == "no progress" for entry in logs):
                assert time.monotonic() < deadline
                time.sleep(0.01)  # noqa: ASYNC251 - blocks the event loop on purpose
    stall = next(entry for entry in logs if entry["event"] == "no progress")
    assert stall["reasons"].startswith("event loop made no progress for ")
    assert "test_a_blocked_event_loop_is_logged" in stall["stack"]


async def test_ready_means_that_nothing_is_awaited() -> None:
    reasons = ["NATS at nats://host:4222", "first weights"]
    async with serving(is_ready=lambda: reasons) as (url, client):
        assert await get(f"{url}/readyz", client) == (503, {"ready": False, "reasons": reasons})
        reasons.clear()
        assert await get(f"{url}/readyz", client) == (200, {"ready": True, "reasons": []})


async def test_status_is_json_even_with_numbers_that_json_cannot_say() -> None:
    status = {
        "loss": math.nan,
        "lag": {"max": math.inf},
        "returns": np.array([1.0, -np.inf]),
        "steps": np.int64(7),
        "run_dir": Path("/runs/a"),
        3: "three",
    }
    async with serving(status=lambda: status) as (url, client):
        assert await get(f"{url}/status", client) == (
            200,
            {
                "loss": None,
                "lag": {"max": None},
                "returns": [1.0, None],
                "steps": 7,
                "run_dir": "/runs/a",
                "3": "three",
            },
        )


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def listen(host: str, port: int) -> None:
    async with serving_http(
        HttpSettings(http_host=host, http_port=port),
        service="test",
        is_ready=list,
        status=dict,
        registry=new_registry(),
        progress=Progress(),
    ):
        pass


async def test_a_port_in_use_is_an_error_that_names_the_address(taken: int) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await listen("127.0.0.1", taken)
    assert str(caught.value) == f"http: cannot listen on 127.0.0.1:{taken}: Address already in use"


async def test_an_address_of_another_machine_is_an_error_that_names_it() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^http: cannot listen on 192\.0\.2\.1:0: (Cannot assign|could not bind)"
    ):
        await listen("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b"])
async def test_a_host_that_is_not_known_is_an_error_that_names_it(host: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^http: cannot listen on {host}:0: (?!Unknown)"):
        await listen(host, 0)


async def test_the_log_says_an_address_that_can_be_asked() -> None:
    with capture_logs() as logs:
        await listen("::1", 0)
    (said,) = [entry for entry in logs if entry["event"] == "http"]
    assert said["address"].startswith("[::1]:")


async def test_the_port_is_free_again_afterwards() -> None:
    async with serving() as (url, _):
        port = int(url.rpartition(":")[2])
    await listen("127.0.0.1", port)


async def metrics(accept: str) -> tuple[str, str]:
    registry = new_registry()
    Counter("seedrl_test_steps_total", "Environment steps.", ["role"], registry=registry).labels(
        "train"
    ).inc()
    Gauge("seedrl_test_streams", "Open streams.", registry=registry).set(2)
    Histogram("seedrl_test_batch_seconds", "Time of a batch.", registry=registry).observe(0.1)
    async with (
        serving(registry=registry) as (url, client),
        client.get(f"{url}/metrics", headers={"Accept": accept}) as response,
    ):
        return response.headers["Content-Type"], await response.text()


async def test_metrics_are_prometheus_text_without_creation_times() -> None:
    content_type, text = await metrics("*/*")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert 'seedrl_test_steps_total{role="train"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text


async def test_prometheus_finds_nothing_to_say_about_the_metrics() -> None:
    assert_clean_metrics((await metrics("*/*"))[1])


def test_a_metric_against_prometheus_conventions_is_found() -> None:
    with pytest.raises(AssertionError):
        assert_clean_metrics("# HELP steps Steps.\n# TYPE steps counter\nsteps 1\n")


async def test_metrics_are_openmetrics_for_those_who_ask() -> None:
    content_type, text = await metrics("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


HALF = b"GET /healthz HTTP/1.1\r\nHost: "


async def half_open(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which half a request was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HALF)
    await writer.drain()
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        return not await reader.read()
    except ConnectionResetError:
        return True


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_a_connection_too_many_closes_the_one_that_has_been_open_longest() -> None:
    async with serving() as (url, client):
        readers, writers = zip(
            *[await half_open(port_of(url)) for _ in range(http._MOST_CONNECTIONS + 2)], strict=True
        )
        assert (await get(f"{url}/healthz", client))[0] == 200
        async with asyncio.timeout(DEADLINE):
            assert all([await is_closed(reader) for reader in readers[:3]])
        writers[3].write(b"test\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            assert (await readers[3].readline()).startswith(b"HTTP/1.1 200")
        for writer in writers:
            writer.close()


async def test_a_connection_without_a_whole_request_is_closed_and_one_with_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_REQUEST_SECONDS", 0.2)
    async with serving() as (url, _):
        kept, writer = await half_open(port_of(url))
        writer.write(b"test\r\n\r\n")
        assert (await kept.readline()).startswith(b"HTTP/1.1 200")
        silent, other = await half_open(port_of(url))
        async with asyncio.timeout(DEADLINE):
            assert await is_closed(silent)
        writer.write(HALF + b"test\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(DEADLINE):
            assert (await kept.read()).count(b"HTTP/1.1 200") == 1
        writer.close()
        other.close()


FEW_DESCRIPTORS = 128
SERVICE = """
import asyncio, sys, uvloop
from shared.config import HttpSettings
from shared.http import new_registry, serving_http
from shared.telemetry import Progress

def status():
    with open("/dev/null"):  # as a service writes its files
        return {"files": "can be opened"}

async def main():
    async with serving_http(HttpSettings(), service="test", is_ready=list, status=status,
                            registry=new_registry(), progress=Progress()) as port:
        print(port, file=sys.stderr, flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""


async def test_all_is_answered_while_hundreds_of_connections_are_half_open() -> None:
    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, FEW_DESCRIPTORS))

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVICE),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=few_descriptors,
    )
    assert process.stderr is not None
    sockets: list[socket.socket] = []
    try:
        port = int(await process.stderr.readline())
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(DEADLINE)
        ) as client:
            for count in (100, 300):
                while len(sockets) < count:
                    sockets.append(connecting := socket.socket())
                    connecting.setblocking(False)
                    assert connecting.connect_ex(("127.0.0.1", port)) == errno.EINPROGRESS
                for path in 3 * ("/status", "/healthz", "/readyz", "/metrics"):
                    async with client.get(path, headers={"Connection": "close"}) as response:
                        assert response.status == 200, await response.text()
    finally:
        for each in sockets:
            each.close()
        process.terminate()
        _, errors = await process.communicate()
    assert errors == b""


async def test_malformed_requests_are_one_warning_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as (url, client):
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
            writer.write(b"GET /healthz HTTP/1.1\r\nbad header line\r\n\r\n")
            async with asyncio.timeout(DEADLINE):
                assert (await reader.readline()).startswith(b"HTTP/1.0 400")
            writer.close()
        assert (await get(f"{url}/healthz", client))[0] == 200
    [record] = [each for each in caplog.records if each.levelno >= logging.INFO]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert record.getMessage().startswith("Error handling request from 127.0.0.1: 400, message:")
    assert "\n" not in record.getMessage()


async def test_an_error_of_ones_own_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(status=lambda: 1 / 0) as (url, client), client.get(f"{url}/status") as response:
        assert response.status == 500
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None


async def test_an_unknown_path_is_not_found() -> None:
    async with serving() as (url, client), client.get(f"{url}/nothing") as response:
        assert response.status == 404
