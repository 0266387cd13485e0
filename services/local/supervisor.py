"""Keeps the services of one run alive until the learner is done; knows processes, not their work."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from services.local.process import ChildProcess
from shared.errors import SeedrlError

log = structlog.get_logger()

# Exit statuses that a restart cannot mend: a person's mistake, a refusal, a diverged training.
FINAL_STATUSES = frozenset({2, 4, 5})
MAX_CRASHES = 5
CRASH_WINDOW_SECONDS = 60.0
_LULL_SECONDS = 10.0  # the learner of a run that was stopped ends by then, as its other services do


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
    crashes: list[float] = field(default_factory=list)  # within the window
    fruitless: int = 0  # crashes since the run came on
    steps: int | None = None  # how far it was then

    def delay_after_crash(self, now: float, steps: int | None = None) -> float | None:
        """Seconds to wait before the next start; `steps` is how far the run has come, where that is known.

        None when it has died too often, within the window or since the run came on: where each start takes
        long, no window is long enough.
        """
        self.crashes = [at for at in self.crashes if now - at < self.window_seconds] + [now]
        self.fruitless = self.fruitless + 1 if steps is not None and steps == self.steps else 1
        self.steps = steps
        if max(len(self.crashes), self.fruitless) > self.max_crashes:
            return None
        return 0.2 * float(2 ** (len(self.crashes) - 1))


class SupervisedService:
    """A child process that is started again when it dies."""

    def __init__(
        self,
        process: ChildProcess,
        steps: Callable[[], int | None] = lambda: None,
        *,
        ends_the_run: bool = True,
    ) -> None:
        """`steps`: how far the run has come, where that is known. `ends_the_run`: when it exits with 0."""
        self.process = process
        self.restarts = 0
        self.state = "starting"
        self.died_at = float("-inf")  # at last; monotonic
        self.deaths = ""  # how often and how, in words
        self._steps = steps
        self._ends_the_run = ends_the_run
        self._policy = RestartPolicy()
        self._starting = asyncio.Lock()
        self._ending = asyncio.Event()
        self._is_killed = False

    async def run_until_done(self) -> None:
        """Runs it, again after each death, until it has ended the run or `end` is called.

        One that exits with 0 and ends no run was sent a SIGTERM by somebody, or the run was stopped. Raises
        ServiceFailed.
        """
        while not self._ending.is_set():
            async with self._starting:
                await self.process.start()
            self.state = "running"
            status = await self.process.wait()
            if self._ending.is_set() or (status == 0 and self._ends_the_run):
                self.state = "done"
                return
            await self._recover(status)

    async def _recover(self, status: int) -> None:
        name = self.process.name
        words = self.process.last_words() or f"see {self.process.log}"
        if status in FINAL_STATUSES:
            raise ServiceFailed(f"{name}: {words}", status)
        delay = self._policy.delay_after_crash(time.monotonic(), self._steps())
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if delay is None:
            raise ServiceFailed(f"{name} died again and again ({MAX_CRASHES + 1} times, {how}): {words}", 1)
        self.state, self.died_at = "restarting", time.monotonic()
        self.restarts += 1
        often = "once" if self.restarts == 1 else f"{self.restarts} times, at last"
        self.deaths = f"died {often} with {how}: {words}" if status else f"ended {often} by itself: {words}"
        log.warning("service ended; starting it again", service=name, ended_by=how, last_words=words)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), delay if status else max(delay, _LULL_SECONDS))

    def kill(self) -> None:
        """Ends the process at once and for good."""
        self._is_killed = True
        self._ending.set()
        self.process.kill()

    async def end(self, *, grace_seconds: float) -> ServiceFailed | None:
        """Asks the process to drain and exit; kills it after `grace_seconds`. What kept it from doing so.

        It did not fail where SIGTERM itself ended it, before it had begun, nor where `kill` did.
        """
        self._ending.set()
        async with self._starting:  # what is being started now is ended, too
            pass
        self.process.terminate()
        status = await self.process.ended(within=grace_seconds)
        self.state = "done"
        if status in (0, -signal.SIGTERM) or self._is_killed:
            return None
        if status > 0:
            words = self.process.last_words() or f"see {self.process.log}"
            return ServiceFailed(f"{self.process.name}: {words}", status)
        return ServiceFailed(f"{self.process.name} was killed (signal {-status}) before it had saved", 1)
