import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared.errors import ProtocolError
from shared.wire import inference_pb2 as pb
from shared.wire.pipes import OfferedPipes, Pipes, taken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reopens another process's pipes")

ROWS = 7


def offer_of(pipes: OfferedPipes, pid: int = 0) -> pb.SharedMemory:
    return pb.SharedMemory(pid=pid or os.getpid(), requests_fd=pipes.requests, answers_fd=pipes.answers)


@pytest.fixture
def sides() -> Iterator[tuple[Pipes, Pipes]]:
    """An actor's and inference's."""
    offered = OfferedPipes()
    theirs = taken(offer_of(offered), group_size=ROWS)
    assert theirs is not None
    offered.close()
    yield offered.mine, theirs
    offered.mine.close()
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


async def test_another_process_is_reached_and_its_death_is_the_end() -> None:
    script = (
        "import os, sys; from tests.shared.wire.test_pipes import *\n"
        "pipes = OfferedPipes()\n"
        "print(os.getpid(), pipes.requests, pipes.answers, flush=True)\n"
        "pipes.mine.write(b'hello'); sys.stdin.read()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        pid, requests, answers = map(int, (await process.stdout.readline()).split())
        offer = pb.SharedMemory(pid=pid, requests_fd=requests, answers_fd=answers)
        pipes = taken(offer, group_size=ROWS)
        assert pipes is not None
        assert await pipes.read() == b"hello"
        process.kill()
        assert await pipes.read() is None
        pipes.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    assert taken(offer, group_size=ROWS) is None


def test_what_is_no_pipe_or_too_small_is_not_taken() -> None:
    offered = OfferedPipes()
    memory = os.memfd_create("seedrl-s1")
    try:
        assert taken(pb.SharedMemory(pid=os.getpid()), group_size=ROWS) is None
        for name in ("requests_fd", "answers_fd"):
            offer = offer_of(offered)
            setattr(offer, name, memory)
            assert taken(offer, group_size=ROWS) is None
        assert taken(offer_of(offered), group_size=8_065) is None
        fcntl.fcntl(offered.answers, fcntl.F_SETPIPE_SZ, 4096)
        assert taken(offer_of(offered), group_size=400) is None
        pipes = taken(offer_of(offered), group_size=384)
        assert pipes is not None
        pipes.close()
    finally:
        os.close(memory)
        offered.close()
        offered.mine.close()
