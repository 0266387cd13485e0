"""Addresses to listen on: how they are written, and whether they can be used; knows no protocol."""

import ipaddress
import os
import socket
import sys
from collections import deque

from shared.errors import ConfigurationError

_held: deque[int] = deque()  # descriptors of sockets bound to the ports that were chosen last
_MOST_HELD = 100


def is_loopback(host: str) -> bool:
    """Whether this machine's processes alone reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def joined(host: str, port: int) -> str:
    """`host` and `port` as one address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """`port`, or any for 0, at which `host` can be listened on now.

    On Linux a chosen port is given to nobody else while this process lives; who names it may listen there.
    Raises ConfigurationError with the system's reason, which gRPC writes to stderr and keeps to itself.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if not port:
                return _chosen(probe, place)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
            return port
    except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one of a host
        words = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot listen on {joined(host, port)}: {words}") from error


def _chosen(probe: socket.socket, place: tuple[object, ...]) -> int:
    """A port for `place`, whose own is 0."""
    probe.bind(place)  # without SO_REUSEADDR: Linux takes no port that is bound, as by those held
    port = int(probe.getsockname()[1])
    if sys.platform == "linux":
        # It may be bound again, by who says the same and as long as nobody listens; every server does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _held.append(probe.detach())
        if len(_held) > _MOST_HELD:
            os.close(_held.popleft())
    return port
