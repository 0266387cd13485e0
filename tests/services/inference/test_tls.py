"""The TLS front by itself: one connection that cannot be handed on is nobody else's loss."""

import asyncio
import ssl
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.inference.access import Access, host_of
from services.inference.metrics import InferenceMetrics
from services.inference.tls import Certificate, tls_front
from shared.errors import ConfigurationError
from tests.support.certificates import made_certificates


async def test_a_connection_that_cannot_be_handed_on_leaves_the_others_alone(tmp_path: Path) -> None:
    certificates = made_certificates(tmp_path)
    access = Access((), InferenceMetrics(CollectorRegistry()))
    context = ssl.create_default_context(cafile=certificates.ca)
    peers = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(access.real_peer(f"unix:{writer.get_extra_info('peername')}"))
        writer.write((await reader.readline()).upper())
        writer.close()

    async with tls_front(certificates.cert, certificates.key, access) as front:
        (front.backend.parent / "1").touch()  # the first connection's name is taken
        async with (
            await asyncio.start_unix_server(answer, str(front.backend)),
            front.listening("127.0.0.1", 0) as port,
            asyncio.timeout(20),
        ):
            said = []
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
                writer.write(b"hello\n")
                said.append(await reader.read())
                writer.close()
    assert said == [b"", b"HELLO\n", b"HELLO\n"]
    assert peers == ["ipv4:127.0.0.1:0"] * 2


def test_a_new_certificate_is_taken_and_a_broken_one_is_not(tmp_path: Path) -> None:
    first = made_certificates(tmp_path)
    certificate = Certificate(first.cert, first.key)
    before = certificate.context
    assert certificate.context is before
    first.cert.write_text("half a fi")
    assert certificate.context is before
    made_certificates(tmp_path)
    assert certificate.context is not before


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    certificates = made_certificates(tmp_path)
    with pytest.raises(ConfigurationError, match=r"ca\.key is not the key of .*server\.pem"):
        Certificate(certificates.cert, tmp_path / "ca.key")


def test_addresses_are_read_as_grpc_writes_them() -> None:
    assert host_of("ipv4:10.0.0.7:51") == "10.0.0.7"
    assert host_of("ipv6:%5B::1%5D:51") == "::1"
    assert host_of("unix:") == "unix:"


def test_what_is_refused_is_counted_each_time() -> None:
    registry = CollectorRegistry()
    access = Access(("one", "two"), InferenceMetrics(registry))
    assert access.complaint([("authorization", "Bearer two")], "ipv4:1.1.1.1:1") is None
    for metadata in ([], [("authorization", "Bearer three")], [("authorization", "one")]):
        assert "SEEDRL_INFERENCE_TOKEN" in str(access.complaint(metadata, "ipv4:1.1.1.1:1"))
    name = "seedrl_inference_refused_connections_total"
    assert registry.get_sample_value(name, {"reason": "token"}) == 3
