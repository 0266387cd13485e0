"""Addresses to listen on."""

import itertools
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


def test_no_port_is_chosen_twice_or_is_one_that_the_system_gives_away() -> None:
    ports = [free_port() for _ in range(2000)]
    assert len(set(ports)) == len(ports)
    with socket.create_server(("127.0.0.1", 0)) as given:
        assert max(ports) < 32768 <= given.getsockname()[1]


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = free_port()
        monkeypatch.setattr("shared.addresses._CHOICES", iter([taken.getsockname()[1], port]))
        assert free_port() == port


def test_no_free_port_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("shared.addresses._CHOICES", itertools.repeat(taken.getsockname()[1]))
        with pytest.raises(ConfigurationError, match=r"cannot listen on .*:0: Address already in use"):
            free_port()


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
