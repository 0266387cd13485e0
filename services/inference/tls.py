"""TLS in front of the gRPC server: gRPC's own says nothing of handshakes that fail, and counts none.

Each connection is decrypted here and handed on over a Unix socket in a directory that only this process's
owner may enter. Its name there tells the server whose it is. All this has a thread and an event loop of its
own: asyncio's, since with uvloop's, gRPC's clients wait for ever after their handshake.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from services.inference.access import Access
from shared.certificates import check_readable
from shared.errors import ConfigurationError
from shared.telemetry import get_logger

log = get_logger(__name__)

_HANDSHAKE_SECONDS = 10.0
_BACKLOG = 128
_PIECE_BYTES = 2**20
_HANDSHAKE = b"\x16"  # the first byte of TLS


class Certificate:
    """A certificate chain and its key; read again for the next connection once a file has changed."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises ConfigurationError when they cannot be used."""
        self._files = (certificate, key)
        self._context, self._stamp = self._read(), self._changed()

    @property
    def context(self) -> ssl.SSLContext:
        """For one connection. Files that are not usable just now leave the certificate as it was."""
        with suppress(OSError, ConfigurationError):
            if (stamp := self._changed()) != self._stamp:
                self._context, self._stamp = self._read(), stamp
        return self._context

    def _changed(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)

    def _read(self) -> ssl.SSLContext:
        certificate, key = self._files
        check_readable("tls_cert", certificate)
        check_readable("tls_key", key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(certificate, key)
        except ssl.SSLError as error:
            words = (
                f"{key} is not the key of {certificate}"
                if error.reason == "KEY_VALUES_MISMATCH"
                else f"{certificate} and {key} are no PEM certificate and key"
            )
            raise ConfigurationError(f"tls_cert, tls_key: {words}") from error
        return context


class TlsFront:
    """Takes connections for a gRPC server that listens at `backend`."""

    def __init__(self, certificate: Certificate, access: Access, directory: Path) -> None:
        self.backend = directory / "grpc"
        self._certificate = certificate
        self._access = access
        self._directory = directory
        self._numbers = itertools.count(1)
        self._peers: dict[str, str] = {}  # name of our side of the connection to the server -> address

    def real_peer(self, peer: str) -> str:
        """GRPC's name of whom it sees as `peer`."""
        return self._peers.get(peer.removeprefix("unix:"), peer)

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[int]:
        """Takes connections on `host`:`port` (0: a free one) and yields the port; on leaving, all are closed.

        Raises ConfigurationError when the address cannot be listened on.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        with contextlib.closing(listener):
            try:
                listener.bind((host, port))
                listener.listen(_BACKLOG)
            except OSError as error:
                raise ConfigurationError(f"grpc: cannot listen on {host}:{port}: {error.strerror}") from error
            runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
            loop = runner.get_loop()
            accepting = loop.create_task(self._accept(listener))
            thread = threading.Thread(target=_run, args=(runner, accepting), name="tls")
            thread.start()
            try:
                yield int(listener.getsockname()[1])
            finally:
                loop.call_soon_threadsafe(accepting.cancel)
                await asyncio.to_thread(thread.join)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            while True:
                try:
                    client, address = await loop.sock_accept(listener)
                except OSError:  # too many open files, or it went at once
                    await asyncio.sleep(0.1)
                    continue
                connections.create_task(self._guarded(client, str(address[0])))

    async def _guarded(self, client: socket.socket, address: str) -> None:
        """Whatever goes wrong with one connection, the others go on and new ones are taken."""
        try:
            await self._served(client, address)
        except Exception:
            log.exception("connection lost", peer=address)

    async def _served(self, client: socket.socket, address: str) -> None:
        streams = await self._greeted(client, address)
        if streams is None:
            return client.close()
        reader, writer = streams
        name = str(self._directory / str(next(self._numbers)))
        self._peers[name] = f"ipv6:[{address}]:0" if ":" in address else f"ipv4:{address}:0"
        try:
            await self._handed_on(reader, writer, name)
        finally:
            del self._peers[name]
            await _closed(writer)

    async def _greeted(
        self, client: socket.socket, address: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The connection once it speaks TLS; None for one that does not, which is counted."""
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                first = await _first_byte(client)
                if first == _HANDSHAKE:
                    return await self._shaken(client)
                if first:  # else it was no more than a look whether somebody listens
                    self._access.refused("plaintext", address, "no TLS, which is needed here")
        except TimeoutError:
            self._access.refused("tls", address, f"no TLS handshake in {_HANDSHAKE_SECONDS:g} s")
        except OSError as error:
            reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else "it was broken off"
            self._access.refused("tls", address, f"TLS handshake: {reason.lower().replace('_', ' ')}")
        return None

    async def _shaken(self, client: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection once it speaks TLS. Raises SSLError or another OSError."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_PIECE_BYTES, loop)
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
            client,
            ssl=self._certificate.context,
            ssl_handshake_timeout=2 * _HANDSHAKE_SECONDS,
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _handed_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        ours = socket.socket(socket.AF_UNIX)
        ours.setblocking(False)
        try:
            ours.bind(name)
            await asyncio.get_running_loop().sock_connect(ours, str(self.backend))
            back_reader, back_writer = await asyncio.open_unix_connection(sock=ours, limit=_PIECE_BYTES)
        except BaseException:
            ours.close()
            raise
        finally:
            with suppress(OSError):
                os.unlink(name)  # names are what directories have; the connection keeps its own
        ways = [
            asyncio.create_task(_carried(reader, back_writer)),
            asyncio.create_task(_carried(back_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            await _closed(back_writer)


async def _first_byte(client: socket.socket) -> bytes:
    """What comes first, left where it is; empty when the client leaves instead."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(client, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(client)
    try:
        return client.recv(1, socket.MSG_PEEK)
    except OSError:
        return b""


def _run(runner: asyncio.Runner, accepting: "asyncio.Task[None]") -> None:
    async def until_cancelled() -> None:
        await asyncio.wait([accepting])

    with runner:
        runner.run(until_cancelled())


async def _closed(writer: asyncio.StreamWriter) -> None:
    """Closes, for a second in good form."""
    writer.close()
    try:
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


async def _carried(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carries what comes, as fast as it is taken, until one side ends."""
    with suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()


@asynccontextmanager
async def tls_front(certificate: Path, key: Path, access: Access) -> AsyncIterator[TlsFront]:
    """A front with its private directory. Raises ConfigurationError for files that cannot be used."""
    checked = Certificate(certificate, key)
    with tempfile.TemporaryDirectory(prefix="seedrl-tls-", ignore_cleanup_errors=True) as directory:
        front = TlsFront(checked, access, Path(directory))
        access.real_peer = front.real_peer
        yield front
