"""Addresses to listen on."""

import os
import re
import socket
import subprocess
import sys

import pytest

from shared.addresses import free_port, is_loopback, joined
from shared.errors import ConfigurationError

held_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ports cannot be held")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "inference")],
)
def test_who_listens_where_others_reach_it_is_told(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert joined("host", 1) == "host:1"
    assert joined("::1", 1) == "[::1]:1"


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "nowhere.invalid"])
def test_a_host_that_is_none_is_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^cannot listen on {host}:0: "):
        free_port(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_free_port_can_be_listened_on(host: str) -> None:
    port = free_port(host)
    assert free_port(host, port) == port


@held_on_linux
def test_a_chosen_port_is_given_to_nobody_else_but_can_be_listened_on() -> None:
    port = free_port()
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port))  # as who asks for any port is given one
    listen = f"import socket; socket.create_server(('127.0.0.1', {port})).close()"
    subprocess.run([sys.executable, "-c", listen], check=True)


@held_on_linux
def test_only_the_newest_of_many_ports_are_held() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ports = [free_port() for _ in range(300)]
    assert len(set(ports[-100:])) == 100
    assert len(os.listdir("/proc/self/fd")) <= before + 100


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_refused_with_the_systems_reason(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        port = taken.getsockname()[1]
        said = re.escape(f"cannot listen on {joined(host, port)}: Address already in use")
        with pytest.raises(ConfigurationError, match=said):
            free_port(host, port)


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot listen on {host}:5"):
        free_port(host, 5)
