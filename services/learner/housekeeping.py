"""What the learner does about once a second beside training: episodes, speeds, curves, warnings."""

import asyncio
import time
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from pathlib import Path

from services.learner.curves import Curves
from services.learner.episodes import EpisodeLog
from services.learner.report import Report
from services.learner.settling import Bookkeeper
from shared.bus.connection import Bus
from shared.bus.episodes import EpisodeConsumer
from shared.bus.statuses import watched_statuses
from shared.bus.work_queue import queue_state
from shared.errors import ConnectionFailed
from shared.runtime import in_thread
from shared.telemetry import get_logger

TICK_SECONDS = 1.0
_FETCH_SECONDS = 1.0
_WARN_SECONDS = 60.0

log = get_logger(__name__)


class Housekeeping:
    """Keeps `report` and the accounts' clock up to date, and writes the curves in `executor`."""

    def __init__(
        self, bus: Bus, report: Report, books: Bookkeeper, *, run_dir: Path, executor: Executor
    ) -> None:
        self._bus = bus
        self._report = report
        self._books = books
        self._executor = executor
        self._episodes = EpisodeLog(report.accounts)
        self._curves = Curves(run_dir)
        self._last = time.monotonic()
        self._warned_at = -_WARN_SECONDS
        self._refused = report.accounts.refused["lag"]

    async def follow_episodes(self) -> None:
        """Counts episodes as inference publishes them, for ever."""
        consumer = EpisodeConsumer(self._bus)
        while True:
            self._episodes.note(await consumer.fetch(timeout=_FETCH_SECONDS))

    async def follow_statuses(self) -> None:
        """Lets the report know what the other services say of themselves, for ever."""
        await self._bus.connected()
        async with watched_statuses(self._bus) as board:
            self._report.board = board
            await asyncio.Event().wait()

    async def tick(self) -> None:
        """Once a second, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(TICK_SECONDS)

    async def look(self) -> None:
        """Brings everything up to date."""
        report, now = self._report, time.monotonic()
        if report.has_chunks:
            report.accounts.seconds += now - self._last
            self._books.write_soon()
        self._last = now
        report.sample(now)
        self._warn_of_refusals(now)
        with suppress(ConnectionFailed, TimeoutError):
            async with asyncio.timeout(TICK_SECONDS):  # a server that stands still holds up nothing
                report.queue = await queue_state(self._bus)
        if report.update is not None:
            write = partial(self._curves.write, report.steps, report.curves(), self._episodes.take())
            await in_thread(write, self._executor)

    async def close(self) -> None:
        """Looks a last time and closes the curves."""
        await self.look()
        await in_thread(self._curves.close, self._executor)

    def _warn_of_refusals(self, now: float) -> None:
        refused = self._report.accounts.refused["lag"]
        if refused > self._refused and now - self._warned_at >= _WARN_SECONDS:
            log.warning(
                "chunks are refused because their weights are too old; a larger --max-policy-lag or "
                "--batch-size, or fewer environments, would change that",
                refused=refused - self._refused,
                trained=self._report.accounts.trained,
            )
            self._refused, self._warned_at = refused, now
