"""The one thread that runs the device; the event loop hands it jobs, save those that are not worth it."""

import asyncio
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from shared.runtime import outcome

T = TypeVar("T")

_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]
_BEAT_SECONDS = 1.0


class ModelThread:
    """Runs jobs one after another, in the order in which they were given.

    A job that is quick is done by the event loop itself when nothing is before it, which spares waking the
    thread and taking turns with it. Two jobs are never done at once.

    The queue is bounded by its users: the dispatcher has two batches in it at most, the weights one job.
    `beat` is called between jobs and once a second while there are none, so a job that hangs shows.
    """

    def __init__(self, *, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._given = self._done = 0  # jobs; the former is the loop's to write, the latter the thread's

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for the jobs that were given; then the thread has ended."""
        done = self.call(lambda: None)
        self._jobs.put(None)
        await asyncio.shield(done)
        self._thread.join()  # at once: it has nothing left to do

    def call(self, job: Callable[[], T], *, is_quick: bool = False) -> asyncio.Future[T]:
        """The future of `job`'s result. Cancelling it does not stop a job that runs.

        One that `is_quick` may be done before this returns.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if is_quick and self._given == self._done:
            outcome(job, future)()
        else:
            self._given += 1
            self._jobs.put((job, future))
        return future

    def _work(self) -> None:
        while True:
            self._beat()
            try:
                item = self._jobs.get(timeout=_BEAT_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            self._do(*item)
            del item

    def _do(self, job: Callable[[], T], future: asyncio.Future[T]) -> None:
        tell = None if future.cancelled() else outcome(job, future)
        self._done += 1  # before anybody hears of it
        if tell is not None:
            self._loop.call_soon_threadsafe(tell)
