"""A directory that one process at a time writes; knows nothing of what lies in it.

A process that was stopped holds it until it ends: continued, it would write over what its successor wrote.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from shared.errors import RunError

LOCK_FILE = "lock"
_POLL_SECONDS = 0.2

log = structlog.get_logger(__name__)


@asynccontextmanager
async def locked_directory(directory: Path, *, on_wait: Callable[[str], None]) -> AsyncIterator[None]:
    """Holds the lock of `directory`, which is made where missing, during the block.

    Another process that holds it is waited for, for ever; `on_wait` hears in words which one. A file system
    that knows no locks is gone on with, with a warning. Raises RunError when it cannot be written.
    """
    lock = _opened(directory)
    try:
        await _take(lock, directory, on_wait)
        with suppress(OSError):  # a full disk: nobody can say who holds it
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(lock)


def _opened(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"cannot write {directory}: {error.strerror}") from error


async def _take(lock: int, directory: Path, on_wait: Callable[[str], None]) -> None:
    said = ""
    while not _is_taken(lock, directory):
        holder = os.pread(lock, 200, 0).decode(errors="replace") or "another process"
        words = f"{directory}, which {holder} still uses: end that process if it is stopped"
        if words != said:
            log.warning("directory in use", words=words)
            on_wait(words)
            said = words
        await asyncio.sleep(_POLL_SECONDS)


def _is_taken(lock: int, directory: Path) -> bool:
    """Whether nobody else holds it now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning(
            "directory cannot be locked: nothing else may write it",
            directory=str(directory),
            reason=str(error),
        )
    return True
