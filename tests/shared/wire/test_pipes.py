import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import ProtocolError
from shared.wire import inference_pb2 as pb
from shared.wire.pipes import OfferedPipes, Pipes, taken
from shared.wire.shared_memory import SharedObservation
from tests.support.counting_group import ENVIRONMENT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reopens another process's pipes")

ROWS = 7


class Offer:
    """An actor's: memory, and pipes beside it."""

    def __init__(self) -> None:
        self.memory = SharedObservation(ENVIRONMENT, group_size=ROWS, stream_id="s1")
        self.pipes = OfferedPipes()

    def message(self, **changes: int) -> pb.SharedMemory:
        fields = {"requests_fd": self.pipes.requests, "answers_fd": self.pipes.answers, **changes}
        memory = self.memory.offer
        return pb.SharedMemory(**{"pid": memory.pid, "fd": memory.fd, **fields})

    def taken(self, rows: int = ROWS, stream_id: str = "s1", **changes: int) -> Pipes | None:
        return taken(self.message(**changes), group_size=rows, stream_id=stream_id)

    def close(self) -> None:
        self.memory.close()
        self.pipes.close()
        self.pipes.mine.close()


@pytest.fixture
def offer() -> Iterator[Offer]:
    offer = Offer()
    yield offer
    offer.close()


@pytest.fixture
def sides() -> Iterator[tuple[Pipes, Pipes]]:
    """An actor's and inference's."""
    offer = Offer()
    theirs = offer.taken()
    assert theirs is not None
    offer.memory.close()
    offer.pipes.close()
    yield offer.pipes.mine, theirs
    offer.pipes.mine.close()
    theirs.close()


async def test_what_one_side_writes_the_other_one_reads(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    for number, message in enumerate((b"", b"a", bytes(65_532), os.urandom(5_000))):
        reader, writer = sides if number % 2 else reversed(sides)
        writer.write(message)
        assert await reader.read() == message
    waiting = asyncio.create_task(inference.read())
    await asyncio.sleep(0)
    actor.write(b"later")
    assert await waiting == b"later"


async def test_a_cancelled_read_loses_nothing(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await inference.read()
    actor.write(b"one")
    assert await inference.read() == b"one"


@pytest.mark.parametrize("ends", [0, 1])
async def test_the_end_of_one_side_is_seen_by_the_other_one_after_the_last_message(
    sides: tuple[Pipes, Pipes], ends: int
) -> None:
    gone, stays = sides[ends], sides[1 - ends]
    gone.write(b"last")
    gone.close()
    assert await stays.read() == b"last"
    assert await stays.read() is None
    stays.write(b"lost")
    assert await stays.read() is None
    gone.close()


async def test_who_waits_is_told_of_the_end(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    waiting = asyncio.create_task(actor.read())
    await asyncio.sleep(0)
    actor.end()
    assert await waiting is None
    reading = asyncio.create_task(inference.read())
    await asyncio.sleep(0)
    actor.close()
    assert await reading is None


async def test_a_message_that_finds_the_one_before_unread_is_refused(sides: tuple[Pipes, Pipes]) -> None:
    actor, _ = sides
    actor.write(bytes(60_000))
    with pytest.raises(ProtocolError, match="finds no room in the pipe"):
        actor.write(bytes(20_000))
    with pytest.raises(ProtocolError, match="finds no room in the pipe"):
        actor.write(b"")


async def test_two_messages_at_once_are_none(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    actor.write(b"one")
    actor.write(b"two")
    with pytest.raises(ProtocolError, match="the pipe brought 14 bytes, its message has 7"):
        await inference.read()


async def test_a_piece_of_a_message_is_none(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    os.write(actor._writes, b"\5\0\0\0ab")
    actor.close()
    with pytest.raises(ProtocolError, match="the pipe ended after 6 bytes of a message"):
        await inference.read()


async def test_a_flood_is_not_kept(sides: tuple[Pipes, Pipes]) -> None:
    actor, inference = sides
    actor.write(b"first")
    assert await inference.read() == b"first"
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            os.write(actor._writes, bytes(60_000))
        await asyncio.sleep(0)
    assert len(inference._received) <= 2 * 65_536
    with pytest.raises(ProtocolError, match="the pipe brought"):
        await inference.read()


async def test_another_process_is_reached_and_its_death_is_the_end() -> None:
    script = (
        "import sys; from tests.shared.wire.test_pipes import *\n"
        "offer = Offer()\n"
        "print(offer.message().SerializeToString().hex(), flush=True)\n"
        "offer.pipes.mine.write(b'hello'); sys.stdin.read()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        said = await process.stdout.readline()
        message = pb.SharedMemory.FromString(bytes.fromhex(said.decode()))
        pipes = taken(message, group_size=ROWS, stream_id="s1")
        assert pipes is not None
        assert await pipes.read() == b"hello"
        process.kill()
        assert await pipes.read() is None
        pipes.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert taken(message, group_size=ROWS, stream_id="s1") is None


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_what_is_no_pipe_is_not_even_opened(offer: Offer, tmp_path: Path) -> None:
    before = open_descriptors()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    other = os.open(fifo, os.O_RDWR)  # would open, too
    try:
        for changes in (
            {"requests_fd": other},
            {"answers_fd": other},
            {"requests_fd": offer.memory.offer.fd},
            {"requests_fd": 2**31},
            {"requests_fd": 0},
            {"answers_fd": 0},
            {"pid": 0},
        ):
            assert offer.taken(**changes) is None
    finally:
        os.close(other)
    assert open_descriptors() == before


def test_pipes_of_a_process_without_the_streams_memory_are_not_taken(offer: Offer) -> None:
    before = open_descriptors()
    assert offer.taken(stream_id="s2") is None
    assert offer.taken(fd=offer.pipes.requests) is None
    assert open_descriptors() == before


def test_pipes_that_are_too_small_are_not_taken(offer: Offer) -> None:
    before = open_descriptors()
    assert offer.taken(rows=8_065) is None
    fcntl.fcntl(offer.pipes.answers, fcntl.F_SETPIPE_SZ, 4096)
    assert offer.taken(rows=400) is None
    assert open_descriptors() == before
    pipes = offer.taken(rows=384)
    assert pipes is not None
    pipes.close()
    assert open_descriptors() == before
