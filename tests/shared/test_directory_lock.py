import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shared.directory_lock import locked_directory
from shared.errors import RunError
from tests.support.waiting import eventually

HOLDER = """
import asyncio, sys
from pathlib import Path
from shared.directory_lock import locked_directory

async def hold():
    async with locked_directory(Path(sys.argv[1]), on_wait=print):
        print("holds", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""


@contextmanager
def holding(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        try:
            yield process
        finally:
            process.kill()


async def hold(directory: Path, said: list[str], inside: asyncio.Event) -> None:
    async with locked_directory(directory, on_wait=said.append):
        inside.set()
        await asyncio.Event().wait()


async def test_a_stopped_holder_is_waited_for_by_name_until_it_ends(tmp_path: Path) -> None:
    said, inside = list[str](), asyncio.Event()
    with holding(tmp_path / "run") as process:
        process.send_signal(signal.SIGSTOP)
        waiting = asyncio.create_task(hold(tmp_path / "run", said, inside))
        await eventually(lambda: said)
        assert f"process {process.pid} on " in said[0]
        assert not inside.is_set()
        process.kill()
        async with asyncio.timeout(10):
            await inside.wait()
        assert len(said) == 1
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_lock_that_was_given_up_is_free_at_once(tmp_path: Path) -> None:
    said = list[str]()
    for _ in range(3):
        async with locked_directory(tmp_path, on_wait=said.append):
            assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert said == []


async def test_who_waits_can_be_cancelled(tmp_path: Path) -> None:
    said = list[str]()
    async with locked_directory(tmp_path, on_wait=said.append):
        waiting = asyncio.create_task(hold(tmp_path, said, asyncio.Event()))
        await eventually(lambda: said)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with locked_directory(tmp_path, on_wait=said.append):
        assert len(said) == 1


async def test_without_locks_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_none(lock: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", has_none)
    with capture_logs() as logs:
        async with locked_directory(tmp_path, on_wait=pytest.fail):
            pass
    assert [line["event"] for line in logs] == ["directory cannot be locked: nothing else may write it"]


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*/file/run: Not a directory"):
        async with locked_directory(tmp_path / "file" / "run", on_wait=pytest.fail):
            pass
