"""The HTTP side of every service: /healthz, /readyz, /metrics and /status; knows no particular service."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, Self

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from shared.addresses import joined
from shared.config import HttpSettings
from shared.errors import ConfigurationError
from shared.telemetry import Progress, get_logger, watchdog

EVENT_LOOP = "event loop"

_SHUTDOWN_SECONDS = 1.0  # for answers under way; aiohttp's own 60 s are longer than the grace period
# Each connection takes a descriptor, and without one the service cannot write its files.
_MOST_CONNECTIONS = 64
_BACKLOG = 16  # connections that the event loop may accept before it gets round to closing others
_REQUEST_SECONDS = 10.0  # from connecting to the first whole request
_IDLE_SECONDS = 75.0  # between two requests of a connection
_MALFORMED_SECONDS = 60.0  # between two lines in the log

_server_log = logging.getLogger(f"{__name__}.server")

log = get_logger(__name__)


def new_registry() -> CollectorRegistry:
    """A registry with the process's own metrics. Metrics made after this call have no `_created` series."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@asynccontextmanager
async def serving_http(
    settings: HttpSettings,
    *,
    service: str,
    is_ready: Callable[[], list[str]],
    status: Callable[[], dict[str, Any]],
    registry: CollectorRegistry,
    progress: Progress,
) -> AsyncIterator[int]:
    """Answers HTTP where `settings` say (port 0: a free one) while the context is open; yields the port.

    * /healthz: 200, or 503 when the event loop or anything else in `progress` stands still for more than
      `watchdog_seconds`; then all stacks are logged, too.
    * /readyz: 200, or 503 with the reasons that `is_ready` gives; an empty list is ready.
    * /metrics: `registry` for Prometheus.
    * /status: what `status` returns, as JSON; numbers that are not finite become null.

    At most 64 connections stay open: a further one closes that which has been open longest, so that a probe
    is always answered. One that makes no whole request within 10 s is closed, too.

    Raises ConfigurationError when the address cannot be listened on.
    """
    host, port, watchdog_seconds = settings.http_host, settings.http_port, settings.watchdog_seconds

    def healthz(_: web.Request) -> web.Response:
        stalled = progress.stalled(monotonic(), watchdog_seconds)
        return _verdict("healthy", [stalled] if stalled else [])

    @web.middleware
    async def noted(request: web.Request, handler: Handler) -> web.StreamResponse:
        connections.made_request(request.protocol)
        return await handler(request)

    application = web.Application(middlewares=[noted])
    for path, answer in {
        "/healthz": healthz,
        "/readyz": lambda _: _verdict("ready", is_ready()),
        "/metrics": lambda request: _metrics(request, registry),
        "/status": lambda _: _json(status()),
    }.items():
        application.router.add_get(path, _asynchronous(answer))
    async with AsyncExitStack() as stack:
        stack.enter_context(_beating(progress, watchdog_seconds))
        stack.enter_context(_malformed_requests_said_sparingly())
        runner = web.AppRunner(
            application,
            access_log=None,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            keepalive_timeout=_IDLE_SECONDS,
            logger=_server_log,
        )
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        assert runner.server is not None
        connections = stack.enter_context(_Connections(runner.server))
        try:
            loop = asyncio.get_running_loop()
            listening = await loop.create_server(connections.new, host, port, backlog=_BACKLOG)
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one of a host
            where = joined(host, port)
            raise ConfigurationError(f"http: cannot listen on {where}: {_reason(error)}") from error
        stack.callback(listening.close)
        bound = int(listening.sockets[0].getsockname()[1])
        log.info("http", service=service, address=joined(host, bound))
        yield bound


class _Connections:
    """Bounds how many connections `server` has, and how long they stay without a request."""

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._silent.values():
            timer.cancel()

    def new(self) -> web.RequestHandler:
        """The protocol of a connection that is being accepted."""
        connection, loop = self._server(), asyncio.get_running_loop()
        self._silent[connection] = loop.call_later(_REQUEST_SECONDS, self._close, connection)
        loop.call_soon(loop.call_soon, self._close_oldest)  # once it counts among the server's
        return connection

    def made_request(self, connection: web.RequestHandler) -> None:
        """The connection has sent a whole request."""
        if timer := self._silent.pop(connection, None):
            timer.cancel()

    def _close_oldest(self) -> None:
        for connection in self._server.connections[:-_MOST_CONNECTIONS]:  # in the order of their beginning
            self._close(connection)

    def _close(self, connection: web.RequestHandler) -> None:
        self.made_request(connection)
        if connection.transport is not None:
            connection.transport.abort()


@contextmanager
def _malformed_requests_said_sparingly() -> Iterator[None]:
    """Within, what is no HTTP, a mistake of the client's, is a warning now and then, without a traceback."""
    said_at = -_MALFORMED_SECONDS

    def shorten(record: logging.LogRecord) -> bool:
        nonlocal said_at
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        if (now := monotonic()) - said_at < _MALFORMED_SECONDS:
            return False
        said_at = now
        words = " ".join(f"{record.getMessage()}: {error}".split())
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = words, (), None
        return True

    _server_log.addFilter(shorten)
    try:
        yield
    finally:
        _server_log.removeFilter(shorten)


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


def _reason(error: OSError | UnicodeError) -> str:
    """Without the address, which asyncio repeats in its text; a failed name lookup has a negative number."""
    if isinstance(error, UnicodeError):
        return str(error)
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error.strerror or error)
