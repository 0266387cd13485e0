"""Processes of this machine, as /proc tells of them."""

import asyncio.subprocess
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def children(process: "subprocess.Popen[str] | asyncio.subprocess.Process", *names: str) -> dict[str, int]:
    """Process ids of children, by a word of their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            words = (path / "cmdline").read_text()
        except OSError:
            continue
        for name in names:
            if parent == process.pid and name in words:
                found[name] = int(path.name)
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    return state(pid) not in ("", "Z")


def state(pid: int) -> str:
    """R, S, T (stopped) and so on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@contextlib.contextmanager
def killed_at_last(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """However the block ends, the process is gone then."""
    try:
        yield
    finally:
        process.kill()
        process.wait()
