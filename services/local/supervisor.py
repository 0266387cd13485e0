"""Keeps the services of one run alive until the learner is done; knows processes, not their work."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import structlog

from services.local.process import ChildProcess
from shared.errors import SeedrlError

log = structlog.get_logger()

# Exit statuses that a restart cannot mend: a person's mistake, a refusal, a diverged training.
FINAL_STATUSES = frozenset({2, 4, 5})
MAX_CRASHES = 5
CRASH_WINDOW_SECONDS = 60.0


class ServiceFailed(SeedrlError):
    """A service ended for good with an error of its own."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass
class RestartPolicy:
    """When a service that keeps dying is given up; the clock is passed in."""

    max_crashes: int = MAX_CRASHES
    window_seconds: float = CRASH_WINDOW_SECONDS
    crashes: list[float] = field(default_factory=list)

    def delay_after_crash(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None when it has died too often within the window."""
        self.crashes = [at for at in self.crashes if now - at < self.window_seconds] + [now]
        if len(self.crashes) > self.max_crashes:
            return None
        return 0.2 * float(2 ** (len(self.crashes) - 1))


class SupervisedService:
    """A child process that is started again when it dies."""

    def __init__(self, process: ChildProcess) -> None:
        self.process = process
        self.restarts = 0
        self.state = "starting"
        self._policy = RestartPolicy()
        self._starting = asyncio.Lock()
        self._ending = asyncio.Event()

    async def run_until_done(self) -> None:
        """Runs it, again after each crash, until it exits with 0 or `end` is called. Raises ServiceFailed."""
        while not self._ending.is_set():
            async with self._starting:
                await self.process.start()
            self.state = "running"
            status = await self.process.wait()
            if status == 0 or self._ending.is_set():
                self.state = "done"
                return
            await self._recover(status)

    async def _recover(self, status: int) -> None:
        name = self.process.name
        words = self.process.last_words() or f"see {self.process.log}"
        if status in FINAL_STATUSES:
            raise ServiceFailed(f"{name}: {words}", status)
        delay = self._policy.delay_after_crash(time.monotonic())
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if delay is None:
            raise ServiceFailed(f"{name} died {MAX_CRASHES + 1} times within a minute ({how}): {words}", 1)
        self.state = "restarting"
        self.restarts += 1
        log.warning("service died; starting it again", service=name, ended_by=how, last_words=words)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), delay)

    async def end(self, *, grace_seconds: float) -> None:
        """Asks the process to drain and exit; kills it after `grace_seconds`."""
        self._ending.set()
        async with self._starting:  # what is being started now is ended, too
            pass
        self.process.terminate()
        await self.process.ended(within=grace_seconds)
        self.state = "done"
