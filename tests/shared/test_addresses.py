"""Addresses to listen on."""

import re
import socket

import pytest

from shared.addresses import free_port, joined
from shared.errors import ConfigurationError


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert joined("host", 1) == "host:1"
    assert joined("::1", 1) == "[::1]:1"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_free_port_can_be_listened_on(host: str) -> None:
    port = free_port(host)
    assert free_port(host, port) == port


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
