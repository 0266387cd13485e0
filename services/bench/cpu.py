"""CPU time of processes, from the kernel (Linux)."""

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def own_cpu_seconds() -> float:
    """User and system time of this process and of those that it started and that still run."""
    return time.process_time() + sum(map(cpu_seconds, children()))


def children(parent: int | None = None) -> list[int]:
    """The processes that `parent`, or this one, started."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _stat(pid)[1:2] == [str(parent or os.getpid())]]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads; 0 when it is gone."""
    return sum(map(int, _stat(pid)[11:13])) / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, from the state on; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
