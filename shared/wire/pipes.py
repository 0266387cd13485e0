"""Messages of a stream through a pair of pipes, between an actor and an inference service on the same host.

Each stands behind its length, four bytes little-endian. Actor and inference speak in turn, so a pipe never
holds more than one message, and none is longer than what a pipe holds. docs/protocol.md says how both agree.
"""

import asyncio
import fcntl
import os
import struct
from contextlib import ExitStack

from shared.errors import ProtocolError
from shared.wire import inference_pb2 as pb
from shared.wire.shared_memory import is_offered

_LENGTH = struct.Struct("<I")
_FRAMING_BYTES = 1_024  # of a message: its length, field tags, and what later versions may add
_ROW_BYTES = 8  # an action; a Step without its observation has one less


class Pipes:
    """One side: reads from the one, writes to the other. To be used on one event loop, and closed there."""

    def __init__(self, reads: int, writes: int) -> None:
        """Takes over two descriptors that do not block."""
        self._reads, self._writes = reads, writes
        self._most = _capacity(reads)
        self._received = bytearray()
        self._is_over = False
        self._loop: asyncio.AbstractEventLoop | None = None  # while it watches
        self._waiting: asyncio.Future[None] | None = None

    def write(self, message: bytes) -> None:
        """Sends; what the other side does not live to take is lost, and its end shows at the next `read`.

        Raises ProtocolError when the one before was not read, since nobody speaks out of turn.
        """
        data = _LENGTH.pack(len(message)) + message
        try:
            written = os.write(self._writes, data)
        except BrokenPipeError:
            return
        except BlockingIOError:
            written = 0
        if written < len(data):
            raise ProtocolError("a message finds no room in the pipe: the one before was not read")

    async def read(self) -> bytes | None:
        """The next message; None when no more will come. Raises ProtocolError on two at once, or a piece."""
        if self._loop is None and not self._is_over:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._reads, self._receive)
        while (message := self._message()) is None:
            if self._is_over:
                if self._received:
                    raise ProtocolError(f"the pipe ended after {len(self._received)} bytes of a message")
                return None
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return message

    def end(self) -> None:
        """No more will come."""
        self._is_over = True
        if self._loop is not None:
            self._loop.remove_reader(self._reads)
            self._loop = None
        self._wake()

    def close(self) -> None:
        """Lets go of both pipes, which the other side sees as the end."""
        if self._reads < 0:
            return
        self.end()
        os.close(self._reads)
        os.close(self._writes)
        self._reads = self._writes = -1

    def _receive(self) -> None:
        try:
            data = os.read(self._reads, self._most)
        except BlockingIOError:
            return
        self._received += data
        if not data or len(self._received) > self._most:  # in the latter case whoever reads will complain
            self.end()
        self._wake()

    def _message(self) -> bytes | None:
        """The message that came, if it did."""
        received = self._received
        if len(received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(received)[0]
        if end > self._most or len(received) > end:
            raise ProtocolError(f"the pipe brought {len(received)} bytes, its message has {end}")
        if len(received) < end:
            return None
        message = bytes(received[_LENGTH.size :])
        received.clear()
        return message

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


class OfferedPipes:
    """A pair that an actor made: its own side is `mine`, the other one is on offer until `close`."""

    def __init__(self) -> None:
        """Raises OSError when the system gives none."""
        with ExitStack() as opened:
            self.requests, write_requests = _made(opened)
            read_answers, self.answers = _made(opened)
            self.mine = Pipes(read_answers, write_requests)
            opened.pop_all()

    def close(self) -> None:
        """Ends the offer; who took it keeps the pipes."""
        os.close(self.requests)
        os.close(self.answers)


def taken(offer: pb.SharedMemory, *, group_size: int, stream_id: str) -> Pipes | None:
    """Inference's side of the pipes that are offered beside memory.

    None where there are none, where they hold too little, or where that process has no memory of this stream.
    """
    if not offer.requests_fd or not offer.answers_fd:
        return None
    with ExitStack() as opened:
        try:
            reads = _opened(opened, offer.pid, offer.requests_fd, os.O_RDONLY)
            writes = _opened(opened, offer.pid, offer.answers_fd, os.O_WRONLY)
            # Asked afterwards: an offer ends with its memory, so these still are the pipes that it names.
            if not is_offered(offer, stream_id=stream_id):
                return None
            if min(_capacity(reads), _capacity(writes)) < _FRAMING_BYTES + _ROW_BYTES * group_size:
                return None
            pipes = Pipes(reads, writes)
        except OSError:
            return None
        opened.pop_all()
        return pipes


def _made(opened: ExitStack) -> tuple[int, int]:
    """A pipe's descriptors, to read from and to write to."""
    pair = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for descriptor in pair:
        opened.callback(os.close, descriptor)
    return pair


def _opened(opened: ExitStack, pid: int, descriptor: int, how: int) -> int:
    """Another process's pipe. Raises OSError, also where it is something else, which is not opened."""
    path = f"/proc/{pid}/fd/{descriptor}"
    if not os.readlink(path).startswith("pipe:["):
        raise OSError(f"{path} is no pipe")
    descriptor = os.open(path, how | os.O_CLOEXEC | os.O_NONBLOCK)
    opened.callback(os.close, descriptor)
    return descriptor


def _capacity(pipe: int) -> int:
    """Bytes that fit in."""
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
