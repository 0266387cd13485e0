"""The HTTP side of every service: /healthz, /readyz, /metrics and /status; knows no particular service."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from time import monotonic
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from shared.errors import ConfigurationError
from shared.telemetry import Progress, get_logger, watchdog

EVENT_LOOP = "event loop"

_SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp's own 60 s are longer than the grace period

log = get_logger(__name__)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own metrics. Metrics made after this call have no `_created` series."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@asynccontextmanager
async def serving_http(
    host: str,
    port: int,
    *,
    service: str,
    is_ready: Callable[[], list[str]],
    status: Callable[[], dict[str, Any]],
    registry: CollectorRegistry,
    progress: Progress,
    watchdog_seconds: float,
) -> AsyncIterator[int]:
    """Answers HTTP on `host`:`port` (0: a free one) while the context is open; yields the port.

    * /healthz: 200, or 503 when the event loop or anything else in `progress` stands still for more than
      `watchdog_seconds`; then all stacks are logged, too.
    * /readyz: 200, or 503 with the reasons that `is_ready` gives; an empty list is ready.
    * /metrics: `registry` for Prometheus.
    * /status: what `status` returns, as JSON; numbers that are not finite become null.

    Raises ConfigurationError when the address cannot be listened on.
    """

    def healthz(_: web.Request) -> web.Response:
        stalled = progress.stalled(monotonic(), watchdog_seconds)
        return _verdict("healthy", [stalled] if stalled else [])

    application = web.Application()
    for path, answer in {
        "/healthz": healthz,
        "/readyz": lambda _: _verdict("ready", is_ready()),
        "/metrics": lambda request: _metrics(request, registry),
        "/status": lambda _: _json(status()),
    }.items():
        application.router.add_get(path, _asynchronous(answer))
    async with AsyncExitStack() as stack:
        stack.enter_context(_beating(progress, watchdog_seconds))
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(f"http: cannot listen on {host}:{port}: {_reason(error)}") from error
        bound = int(runner.addresses[0][1])
        log.info("http", service=service, address=f"{host}:{bound}")
        yield bound


@contextmanager
def _beating(progress: Progress, watchdog_seconds: float) -> Iterator[None]:
    """Within, the event loop beats and the watchdog looks."""
    loop = asyncio.get_running_loop()
    interval = min(1.0, watchdog_seconds / 4)

    def beat() -> None:
        progress.beat(EVENT_LOOP)
        timer[0] = loop.call_later(interval, beat)

    progress.beat(EVENT_LOOP)
    timer = [loop.call_later(interval, beat)]
    try:
        with watchdog(progress, watchdog_seconds, loop=loop):
            yield
    finally:
        timer[0].cancel()
        progress.forget(EVENT_LOOP)


def _asynchronous(
    answer: Callable[[web.Request], web.Response],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        return answer(request)

    return handler


def _verdict(word: str, reasons: list[str]) -> web.Response:
    return _json({word: not reasons, "reasons": reasons}, status=503 if reasons else 200)


def _json(value: dict[str, Any], *, status: int = 200) -> web.Response:
    """`value` as JSON; NaN and infinities, which JSON cannot say, as null, other objects as text."""
    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    body = orjson.dumps(value, default=str, option=options)
    return web.Response(body=body, status=status, content_type="application/json")


def _metrics(request: web.Request, registry: CollectorRegistry) -> web.Response:
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(registry), headers={"Content-Type": content_type})


def _reason(error: OSError) -> str:
    """Without the address, which asyncio repeats in its text; a failed name lookup has a negative number."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
