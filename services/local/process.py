"""One child process: started, watched, ended; knows nothing of what runs in it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from services.parent_death import ending_with_this_process
from shared.presets import ENV_PREFIX

log = structlog.get_logger(__name__)

_SAYS = "seedrl: "  # before what a command says to a person


def seedrl(*words: str) -> list[str]:
    """The command line of a `seedrl` command in this installation."""
    return module("services.cli", *words)


def module(name: str, *words: str) -> list[str]:
    """The command line of a module of this installation; the working directory shadows nothing."""
    return [sys.executable, "-P", "-m", name, *words]


def clean_environment() -> dict[str, str]:
    """What a child inherits: no settings, which are in its configuration already and would win over it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def _before_it_runs(niceness: int) -> Callable[[], None]:
    end_with_parent = ending_with_this_process()

    def prepare() -> None:
        os.setsid()  # so that Ctrl-C reaches the supervisor alone; uvloop would do it after this function
        end_with_parent()
        if not niceness:
            return
        os.nice(niceness)
        # Where Linux schedules each session as a whole, this is what counts between sessions.
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
            autogroup.write(str(niceness))

    return prepare


class ChildProcess:
    """A service as a child of this process; it gets SIGTERM when this process dies.

    `niceness`: how much it stands back when others want the processor, 0 to 19 (nice).
    """

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        environment: Mapping[str, str],
        log: Path,
        niceness: int = 0,
    ) -> None:
        self.name = name
        self.log = log
        self.command = command  # asked at every start
        self._environment = {**clean_environment(), **environment}
        self._niceness = niceness
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Starts the process; its output goes to the end of its log file."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                preexec_fn=_before_it_runs(self._niceness),
            )

    async def wait(self) -> int:
        """Waits for the end; the exit status, or minus the signal that ended it."""
        assert self._process is not None
        return await self._process.wait()

    def terminate(self) -> None:
        """Asks it to drain, save and exit."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    async def ended(self, *, within: float) -> int:
        """Waits up to `within` seconds for its end, then kills it; as `wait`, or 0 where it never started."""
        if self._process is None:
            return 0
        try:
            return await asyncio.wait_for(self._process.wait(), within)
        except TimeoutError:
            log.warning("killed, as it did not end in time", service=self.name, seconds=within)
            self.kill()
            return await self._process.wait()

    def last_words(self) -> str:
        """What this start of the process said last of itself; nothing when a signal ended it."""
        if self._process is None or (self._process.returncode or 0) < 0:
            return ""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - 65536))
            lines = log.read().decode(errors="replace").splitlines()
            return next((line[len(_SAYS) :] for line in reversed(lines) if line.startswith(_SAYS)), "")
        return ""

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
