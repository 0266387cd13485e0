"""Addresses to listen on: how they are written, and whether they can be used; knows no protocol."""

import errno
import itertools
import random
import socket

from shared.errors import ConfigurationError

# Below the ports that systems give to connections and to listeners on port 0 (Linux: 32768 and above), which
# anybody might be given before the one who asked here listens; and none twice.
_CHOICES = itertools.cycle(random.sample(range(20_000, 32_000), 12_000))
_TRIES = 1000


def joined(host: str, port: int) -> str:
    """`host` and `port` as one address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """`port`, or any for 0, at which `host` can be listened on now.

    Raises ConfigurationError with the system's reason, which gRPC writes to stderr and keeps to itself.
    """
    for chosen in [port] if port else itertools.islice(_CHOICES, _TRIES):
        try:
            _listen_once(host, chosen)
        except OSError as error:
            refused = error
            if error.errno != errno.EADDRINUSE:
                break
        else:
            return chosen
    reason = refused.strerror or refused
    raise ConfigurationError(f"cannot listen on {joined(host, port)}: {reason}") from refused


def _listen_once(host: str, port: int) -> None:
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)
        probe.listen()
