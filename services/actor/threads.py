"""The threads in which environments step, beside the event loop.

Unlike those of a ThreadPoolExecutor they do not keep a process alive, so that an environment which hangs
cannot keep an actor from ending.
"""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from shared.runtime import outcome

T = TypeVar("T")

_END_SECONDS = 0.2
_MOST_SECONDS_BETWEEN_LOOKS = 1.0  # that count; what is longer the process did not run for


class _Job(NamedTuple):
    function: Callable[[], Any]
    limit_seconds: float
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


@dataclass(slots=True)
class _Running:
    """A job that a thread is at."""

    began: float  # by the clock
    got_on: float  # likewise: when it last said so
    limit_seconds: float
    counted_seconds: float = 0.0  # since then, in which this process ran, too


class StepThreads:
    """Runs functions in `count` threads, those of one group always in the same, first come, first served.

    What environments hold may belong to the thread that made it: a graphics context, a database's connection.
    At most one job per group waits.
    """

    def __init__(self, count: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._jobs: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._running: dict[int, _Running] = {}  # by thread
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"step-{number}", daemon=True)
            for number, jobs in enumerate(self._jobs)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the threads end after what is queued; does not wait for one that is stuck."""
        for jobs in self._jobs:
            jobs.put(None)
        # Python may only end once they are out of native code: it would take the process down with it.
        deadline = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    async def run(self, function: Callable[[], T], *, group: int = 0, limit_seconds: float = math.inf) -> T:
        """The result of `function`, which is the group's of this number.

        When cancelled, a function that has begun runs on to its end.
        Nothing can end a function that takes longer than `limit_seconds`, or does not get on for so long, but
        `is_overdue` then says so.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs[group % len(self._jobs)].put(_Job(function, limit_seconds, loop, future))
        return await future

    def gets_on(self) -> None:
        """To be called by a running function that does one thing after the other, after each of them."""
        running = self._running[threading.get_ident()]
        running.got_on, running.counted_seconds = self._clock(), 0.0

    def longest_silence(self) -> float:
        """Seconds since a running function began or got on, at the longest; 0 when none runs."""
        now = self._clock()
        return max((now - job.got_on for job in self._running.copy().values()), default=0.0)

    def is_overdue(self) -> bool:
        """Whether a running function has not got on for its limit; to be asked every second or so.

        Of the time since it was asked last a second at most counts: a process that was stopped, as was its
        machine, did not work on the function either.
        """
        now = self._clock()
        passed = min(now - self._looked_at, _MOST_SECONDS_BETWEEN_LOOKS)
        self._looked_at = now
        jobs = self._running.copy().values()
        for job in jobs:
            job.counted_seconds += min(passed, now - job.got_on)
        return any(job.counted_seconds > job.limit_seconds for job in jobs)

    def _work(self, jobs: "queue.SimpleQueue[_Job | None]") -> None:
        me = threading.get_ident()
        while (job := jobs.get()) is not None:
            if job.future.cancelled():
                continue
            now = self._clock()
            self._running[me] = _Running(now, now, job.limit_seconds)
            tell = outcome(job.function, job.future)
            del self._running[me]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.loop.call_soon_threadsafe(tell)
            del job, tell  # an idle thread keeps no environment alive
