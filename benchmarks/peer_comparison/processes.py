"""A measured system as a child process that leaves nothing behind; knows nothing of what it runs.

Systems start processes in sessions of their own, and some of those outlive their parents. So this process
adopts orphans (Linux: it becomes a child subreaper), and ends every process below it by its id.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from benchmarks.peer_comparison.errors import ComparisonError
from services.bench.cpu import children
from services.parent_death import ending_with_this_process

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 60.0  # a busy machine takes its time to save and exit

# Orphans: when which of them are told what, in seconds after the end of the process that was started.
_ASK_SECONDS = 5.0
_ASK_DAEMONS_SECONDS = 10.0
_KILL_SECONDS = 20.0


class System:
    """A running system; its output goes to `log`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self._log = log
        self._process = process

    def pause(self, seconds: float) -> None:
        """Lets it run for so long. Raises ComparisonError with its last words when it ends instead."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
            raise ComparisonError(f"{self.name} ended with status {status}: {self.last_words()}")

    def last_words(self) -> str:
        """The last line of its output."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def running(
    name: str, command: Sequence[str], *, environment: Mapping[str, str], directory: Path
) -> Iterator[System]:
    """A system started in `directory`; at the end it and everything that it started are ended."""
    others = set(children())
    log = directory / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C reaches this process alone
            preexec_fn=ending_with_this_process(),
        )
    try:
        yield System(name, process, log)
    finally:
        _end(process, others=others)


def adopt_orphans() -> None:
    """Makes whatever outlives its parent below this process its child, so that it can be ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def interrupt_on_signals() -> None:
    """SIGTERM and a closed terminal end the comparison as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _end(process: subprocess.Popen[bytes], *, others: set[int]) -> None:
    """Asks `process`, then kills it; then the same for all that it leaves. Ctrl-C meanwhile hurries it."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
    finally:
        process.kill()
        process.wait()
        _end_orphans(others, session=process.pid)


def _end_orphans(others: set[int], *, session: int) -> None:
    """Ends the adopted children, and theirs, which are adopted in turn, until only `others` are left.

    Those outside `session` clean up when the others are gone (torch's shared memory manager does), if they
    are let: they come last.
    """
    started = time.monotonic()
    while left := set(children()) - others:
        try:
            elapsed = time.monotonic() - started
            for child in left:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.waitpid(child, os.WNOHANG)
                    if elapsed > (_ASK_SECONDS if os.getsid(child) == session else _ASK_DAEMONS_SECONDS):
                        os.kill(child, signal.SIGTERM if elapsed < _KILL_SECONDS else signal.SIGKILL)
            time.sleep(0.1)  # not all of them can be waited for: some are still another's children
        except KeyboardInterrupt:
            started -= _ASK_DAEMONS_SECONDS
