"""A NATS client that never waits on a connection that is gone; knows nothing of runs and streams."""

import asyncio
from contextlib import suppress
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

_CLOSE_SECONDS = 1.0
_CANCEL_AGAIN_SECONDS = 0.1


class TlsMissing(nats.errors.Error):
    """The server speaks no TLS, which is insisted on."""

    def __str__(self) -> str:
        return "it speaks no TLS, which nats_ca insists on"


class PromptTransport(TcpTransport):
    """TCP that is given up after a second when the peer does not take what is still to be sent.

    Without the bound, a peer that vanished (or stands still) with our bytes unsent would hold up both the
    next attempt to connect and the end of the process until the kernel gives up, a quarter of an hour later.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaving = False

    def __bool__(self) -> bool:
        """True before the first connection too: the client replaces a transport that is false."""
        return True

    async def connect(self, uri: Any, buffer_size: int, connect_timeout: int) -> None:
        """Connects; a connection left over from a failed attempt is dropped, not leaked."""
        if self._io_writer is not None:
            self._io_writer.transport.abort()
        await super().connect(uri, buffer_size, connect_timeout)

    async def drain(self) -> None:
        """Waits until the peer takes more; best effort while leaving."""
        if not self.leaving:
            await super().drain()  # type: ignore[no-untyped-call]
            return
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await super().drain()  # type: ignore[no-untyped-call]

    async def wait_closed(self) -> None:
        """Waits for a clean close, for a second at most."""
        # Not cancelled at the timeout: every waiter waits on the same future, and would be cancelled with it.
        closing = asyncio.ensure_future(super().wait_closed())  # type: ignore[no-untyped-call]
        # Retrieved, also when this is cancelled: a connection that the peer cut is as closed as it can be.
        closing.add_done_callback(lambda task: task.cancelled() or task.exception())
        closed, _ = await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)
        if not closed and self._io_writer is not None:
            self._io_writer.transport.abort()
            await asyncio.wait({closing})


class PromptClient(Client):
    """A client whose requests end with the connection they were sent on, not at their timeout.

    Everything of nats-py that asks the server (JetStream, key-value, acknowledgements) goes through
    `request`, so all of it fails promptly, and the caller can try again on the next connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self._transport = PromptTransport()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Before anything is sent: with TLS configured, the token goes over TLS or nowhere."""
        if "tls" in self.options and not info.get("tls_required"):
            raise TlsMissing
        await super()._process_info(info, initial_connection)

    @property
    def lost(self) -> "asyncio.Future[None]":
        """Done when the present connection (or, while there is none, the next) is lost."""
        return self._lost

    def connection_lost(self) -> None:
        """Ends every request in flight with ConnectionReconnectingError."""
        lost, self._lost = self._lost, asyncio.get_running_loop().create_future()
        lost.set_result(None)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """As the base's; raises ConnectionReconnectingError at once where there is no connection."""
        if not self.is_connected:
            raise nats.errors.ConnectionReconnectingError
        asking = super().request(subject, payload, timeout=timeout, old_style=old_style, headers=headers)
        task = asyncio.create_task(asking)
        try:
            ends: set[asyncio.Future[Any]] = {task, self._lost}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise nats.errors.ConnectionReconnectingError
        finally:
            if not task.cancel() and not task.cancelled():
                task.exception()  # retrieved, lest asyncio reports it when the caller was cancelled

    async def leave(self) -> None:
        """Closes for good, within seconds also while the server is away or stands still."""
        if isinstance(self._transport, PromptTransport):
            self._transport.leaving = True
        closing = asyncio.create_task(self.close())
        await asyncio.wait({closing}, timeout=3 * _CLOSE_SECONDS)
        await ended(closing)
        if self._reconnection_task is not None:
            await ended(self._reconnection_task)
        await asyncio.sleep(0)  # the client cancels its other tasks without waiting for them


async def ended(task: "asyncio.Task[Any]") -> None:
    """Cancels `task` until it ends; how it ends does not matter.

    Once is not enough: where an attempt to connect fails in the moment of the cancellation, `wait_for`
    (before Python 3.12) raises the failure in its place, and the client goes on with the next attempt.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_AGAIN_SECONDS)
    if not task.cancelled():
        task.exception()  # retrieved
