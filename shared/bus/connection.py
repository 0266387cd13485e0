"""The connection of one process to NATS for one run; knows nothing of what travels on it.

A service connects patiently: the block starts also while the server is away, and whatever is idempotent is
tried again until it works. A command connects impatiently: no server in time is an error. Both end with
Refused when the server refuses the token, whenever that happens.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import nats.errors
import structlog
from nats.js import JetStreamContext

from shared.bus.beside import beside
from shared.bus.client import PromptClient, TlsMissing, ended
from shared.bus.tls import client_context
from shared.bus.trouble import words
from shared.config import NatsSettings
from shared.errors import ConfigurationError, ConnectionFailed, Refused, SeedrlError
from shared.secrets import without_credentials
from shared.subjects import Subjects

HEADER_BYTES = 1024
"""Kept free of every message: the server counts headers too, and cuts the connection of who exceeds it."""
RETRY_SECONDS = 0.2
API_TIMEOUT_SECONDS = 5.0
_ATTEMPT_SECONDS = 5.0
_PING_SECONDS = 5.0
_MAX_PINGS = 2

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Bus:
    """What everything else in this package is built on: the client, JetStream and the run's names."""

    def __init__(self, connection: "_Connection", subjects: Subjects, *, patient: bool) -> None:
        self.nc = connection.client
        self.js: JetStreamContext = connection.client.jetstream(timeout=API_TIMEOUT_SECONDS)
        self.subjects = subjects
        self.patient = patient
        self._connection = connection

    @property
    def run_id(self) -> str:
        """The run whose names this bus uses."""
        return self.subjects.run_id

    @property
    def address(self) -> str:
        """Where the server is, without credentials; for messages."""
        return self._connection.address

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection.up.is_set() and self.nc.is_connected

    @property
    def max_payload(self) -> int:
        """Bytes that fit a message, room for its headers already taken off.

        Raises ConnectionFailed before the first connection: only the server knows.
        """
        if not self._connection.was_up:
            raise ConnectionFailed(f"not connected to NATS at {self.address} yet")
        return int(self.nc.max_payload) - HEADER_BYTES

    async def connected(self) -> None:
        """Waits until there is a connection."""
        await self._connection.up.wait()

    async def persistently(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The result of `operation`, which must bear repetition.

        While it raises ConnectionFailed it is tried again for ever, with one line in the log, unless the
        bus is impatient.
        """
        complained = False
        while True:
            if self.patient:
                await self.connected()
            try:
                return await operation()
            except ConnectionFailed as error:
                if not self.patient:
                    raise
                if self.is_connected and not complained:
                    complained = True
                    log.warning("nats_trouble", server=self.address, reason=str(error))
            await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def connected_bus(
    settings: NatsSettings, *, run_id: str, name: str, patient: bool
) -> AsyncIterator[Bus]:
    """Connects as `name` (shown by the server); closes on leaving.

    patient: the block starts after the first attempt, connected or not (see `Bus.connected`), and the
    connection is sought for ever. Otherwise ConnectionFailed after `connect_timeout` seconds without one.
    Raises ConfigurationError for a malformed URL, and Refused, also out of the running block, when the
    server refuses the token.
    """
    subjects = Subjects(run_id)
    token = settings.nats_token.get_secret_value() if settings.nats_token is not None else None
    connection = _Connection(
        validated_urls(settings.nats_url), token, name, tls=client_context(settings), logs_start=patient
    )
    try:
        async with beside(connection.connect(), connection.fail()):
            if patient:
                await connection.tried.wait()
            else:
                await connection.up_within(settings.connect_timeout)
            yield Bus(connection, subjects, patient=patient)
    finally:
        await connection.close()


def validated_urls(urls: str) -> list[str]:
    """The servers of a comma-separated list; raises ConfigurationError naming what is no NATS URL."""
    return [_validated(url.strip()) for url in urls.split(",")]


class _Connection:
    """The client of a bus; turns its callbacks into state, one log line per outage, or a failure."""

    def __init__(
        self, urls: list[str], token: str | None, name: str, *, tls: ssl.SSLContext | None, logs_start: bool
    ) -> None:
        self.client = PromptClient()
        self.address = without_credentials(",".join(urls))
        self.up = asyncio.Event()
        self.tried = asyncio.Event()
        self.was_up = False
        given = {"token": token} if token is not None else _credentials(urls)
        self._options: dict[str, Any] = {"servers": urls, "name": name, **given}
        if tls is not None:
            self._options["tls"] = tls
        self._failure: asyncio.Future[SeedrlError] = asyncio.get_running_loop().create_future()
        self._reason = "no answer"
        self._logs_start = logs_start
        self._outage = False
        self._leaving = False
        self._complaint = ""

    async def connect(self) -> None:
        """Returns with the first connection; the client restores every later one by itself."""
        await self._first_connection(
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_up,
            closed_cb=self._on_closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RETRY_SECONDS,
            connect_timeout=_ATTEMPT_SECONDS,
            # A peer that vanished without a word is noticed after (_MAX_PINGS + 1) pings.
            ping_interval=_PING_SECONDS,
            max_outstanding_pings=_MAX_PINGS,
            # Nothing is buffered while there is no connection: who publishes hears of it and decides.
            pending_size=0,
            **self._options,
        )
        await self._on_up()

    async def _first_connection(self, **options: Any) -> None:
        connecting = asyncio.create_task(self.client.connect(**options))
        try:
            await asyncio.wait({connecting})
            connecting.result()
        except ValueError as error:  # more than a line without an end: another protocol speaks there
            raise ConnectionFailed(f"what answers at {self.address} is no NATS server") from error
        finally:
            await ended(connecting)

    async def fail(self) -> None:
        """Raises what ended the connection for good."""
        raise await self._failure

    async def up_within(self, seconds: float) -> None:
        """Waits for the connection; raises ConnectionFailed when there is none in `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self.up.wait()
        except TimeoutError:
            raise ConnectionFailed(
                f"no NATS server at {self.address} within {seconds:g} s: {self._reason}"
            ) from None

    async def close(self) -> None:
        """Closes without a word in the log."""
        self._leaving = True
        self.up.clear()
        await self.client.leave()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, TlsMissing):
            self._fail(Refused(f"NATS at {self.address} is refused: {error}"))
        elif isinstance(error, ssl.SSLCertVerificationError):
            words_ = f"the certificate of NATS at {self.address} is refused: {error.verify_message} (nats_ca)"
            self._fail(Refused(words_))
        elif _is_refusal(error):
            words_ = f"NATS at {self.address} refuses the token or credentials"
            self._fail(Refused(f"{words_} (SEEDRL_NATS_TOKEN; user and password: SEEDRL_NATS_URL)"))
        elif self.up.is_set() and not isinstance(error, (OSError, nats.errors.StaleConnectionError)):
            self._complain(words(error))
        else:
            self._reason = words(error)
            self._log_outage("nats_unreachable")
        self.tried.set()

    async def _on_disconnected(self) -> None:
        self.client.connection_lost()
        self.up.clear()
        self._log_outage("nats_lost")

    async def _on_up(self) -> None:
        self.was_up = True
        self.up.set()
        self.tried.set()
        if self._outage:
            log.info("nats_connected", server=self.address)
        self._outage = False

    async def _on_closed(self) -> None:
        if self._leaving:
            return
        error = self.client.last_error or ConnectionError("closed")
        if _is_refusal(error):
            await self._on_error(error)
        else:
            self._fail(ConnectionFailed(f"NATS at {self.address} ended the connection: {words(error)}"))

    def _fail(self, error: SeedrlError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    def _log_outage(self, event: str) -> None:
        may_log = self.was_up or self._logs_start
        if may_log and not (self._outage or self._leaving or self.up.is_set()):
            self._outage = True
            log.warning(event, server=self.address, reason=self._reason)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            log.error("nats_error", server=self.address, reason=complaint)


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, nats.errors.AuthorizationError):
        return True
    return isinstance(error, nats.errors.Error) and "authorization violation" in str(error).lower()


def _validated(url: str) -> str:
    full = url if "://" in url else f"nats://{url}"
    problem = ""
    try:
        parts = urlsplit(full)
        host = parts.hostname or ""
        port = parts.port
        if parts.scheme not in ("nats", "tls"):
            problem = f"unknown scheme {parts.scheme!r}"
        elif not re.fullmatch(r"[A-Za-z0-9._:-]+", host) or any(not label for label in host.split(".")):
            problem = "no host name"
        elif port == 0:
            problem = "no port"
        elif parts.path not in ("", "/") or parts.query or parts.fragment:
            problem = "more than a host and a port"
    except ValueError as error:
        problem = "user and password want percent-encoding" if "@" in full else str(error)
    if problem:
        raise ConfigurationError(f"{_shown(url)!r} is no NATS URL like nats://host:4222: {problem}")
    return full


def _credentials(urls: list[str]) -> dict[str, str]:
    """User and password, or token, that URLs have percent-encoded: the client would send them like that.

    Empty where there are none, or each server has its own.
    """
    found = {(parts.username, parts.password) for parts in map(urlsplit, urls) if parts.username is not None}
    if len(found) != 1:
        return {}
    ((user, password),) = found
    if password is None:
        return {"token": unquote(user)}
    return {"user": unquote(user), "password": unquote(password)}


def _shown(url: str) -> str:
    return re.sub(r"//.*@", "//…@", url)
