import socket

import nats.errors
import nats.js.errors
import pytest

from shared.bus.trouble import refusal, trouble, words
from shared.errors import ConnectionFailed, Refused


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 9)"), "Connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (TimeoutError(), "no answer in time"),
        (nats.errors.TimeoutError(), "no answer in time"),
        (nats.errors.NoRespondersError(), "nobody there answers"),
        (
            nats.js.errors.ServiceUnavailableError(),
            "JetStream does not answer (is it enabled? nats-server -js)",
        ),
        (nats.js.errors.ServiceUnavailableError(description="no space left"), "no space left"),
        (nats.errors.UnexpectedEOF(), "unexpected EOF"),
        (nats.errors.Error("nats: 'Permissions Violation'"), "Permissions Violation"),
        (OSError(), "OSError"),
    ],
)
def test_errors_are_said_in_words(error: Exception, said: str) -> None:
    assert words(error) == said


def test_trouble_that_passes_is_a_failed_connection() -> None:
    with pytest.raises(ConnectionFailed, match="the queue: no answer in time"), trouble("the queue"):
        raise nats.errors.TimeoutError


def test_what_the_server_refuses_is_refused() -> None:
    with pytest.raises(Refused, match="stream s: bad name"), trouble("stream s"), refusal("stream s"):
        raise nats.js.errors.BadRequestError(code=400, description="bad name")


def test_trouble_is_no_refusal() -> None:
    with pytest.raises(ConnectionFailed), trouble("stream s"), refusal("stream s"):
        raise nats.js.errors.ServiceUnavailableError


def test_other_exceptions_go_through_as_they_are() -> None:
    with pytest.raises(KeyError), trouble("stream s"), refusal("stream s"):
        raise KeyError
