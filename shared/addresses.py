"""Addresses to listen on: how they are written, and whether they can be used; knows no protocol."""

import socket

from shared.errors import ConfigurationError


def joined(host: str, port: int) -> str:
    """`host` and `port` as one address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """`port`, or any for 0, at which `host` can be listened on now.

    Raises ConfigurationError with the system's reason, which gRPC writes to stderr and keeps to itself.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {joined(host, port)}: {error.strerror or error}"
        ) from error
