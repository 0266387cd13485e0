"""A service of a benchmark, in a process of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson

from services.local.process import ChildProcess
from shared.errors import RunError

_END_SECONDS = 5.0


@asynccontextmanager
async def running(process: ChildProcess) -> AsyncIterator[ChildProcess]:
    """Started; told to end on leaving, and killed where it does not."""
    await process.start()
    try:
        yield process
    finally:
        process.terminate()
        await process.ended(within=_END_SECONDS)


async def stays(process: ChildProcess) -> None:
    """Raises RunError, in the service's last words, when it ends."""
    await process.wait()
    raise RunError(f"{process.name} ended: {process.last_words()}")


def last_words(stderr: bytes) -> str:
    """What a process that ended said last of itself."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return (lines or ["it said nothing"])[-1].removeprefix("seedrl: ")


def http_address(log: Path) -> str | None:
    """Where the service that writes `log` answers HTTP; None while it does not say."""
    if log.exists():
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if '"event":"http"' in line:
                return str(orjson.loads(line)["address"])
    return None
