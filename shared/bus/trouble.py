"""What counts as trouble with the connection, which passes, and what as a refusal, which does not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import nats.errors
import nats.js.errors
from nats.errors import Error
from nats.js.errors import APIError

from shared.errors import ConnectionFailed, Refused

STREAM_NAME_IN_USE = 10058
QUEUE_IS_FULL = 10077

_PASSES = (
    OSError,  # TimeoutError too
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionDrainingError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.NoRespondersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
    nats.errors.TimeoutError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServerError,
    nats.js.errors.ServiceUnavailableError,
)


@contextmanager
def trouble(what: str) -> Iterator[None]:
    """Raises ConnectionFailed, "`what`: why", where the block has trouble with the connection or server."""
    try:
        yield
    except _PASSES as error:
        raise ConnectionFailed(f"{what}: {words(error)}") from error


@contextmanager
def refusal(what: str) -> Iterator[None]:
    """Raises Refused, "`what`: why", where the server answers the block with any other error."""
    try:
        yield
    except _PASSES:
        raise
    except Error as error:
        raise Refused(f"{what}: {words(error)}") from error


def words(error: BaseException) -> str:
    """What `error` says, in the words of the server where it has any."""
    if isinstance(error, APIError) and error.description:
        return str(error.description)
    if isinstance(error, (nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError)):
        return "nobody there answers"
    if isinstance(error, nats.js.errors.ServiceUnavailableError):
        return "JetStream does not answer (is it enabled? nats-server -js)"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, nats.errors.ConnectionReconnectingError):
        return "not connected"
    return str(error).removeprefix("nats: ").strip("'") or type(error).__name__
