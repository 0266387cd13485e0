"""Snapshots while the service runs: one at a time, the state taken between two messages, written beside."""

import asyncio
import time
from concurrent.futures import Executor
from functools import partial
from typing import Any

from services.replay.gate import Gate
from services.replay.metrics import ReplayMetrics
from services.replay.report import Report
from services.replay.settling import Bookkeeper
from services.replay.snapshots import Snapshot, Snapshots
from shared.errors import RunError
from shared.runtime import in_thread
from shared.telemetry import get_logger

log = get_logger(__name__)


class Saver:
    """Writes snapshots of what is behind `gate`, in `executor`."""

    def __init__(
        self,
        gate: Gate,
        snapshots: Snapshots,
        books: Bookkeeper,
        report: Report,
        metrics: ReplayMetrics,
        executor: Executor,
        *,
        run: dict[str, Any],
    ) -> None:
        """`run`: what tells this run from others."""
        self._gate = gate
        self._snapshots = snapshots
        self._books = books
        self._report = report
        self._metrics = metrics
        self._executor = executor
        self._run = run
        self._one_at_a_time = asyncio.Lock()

    async def save(self, name: str) -> dict[str, Any]:
        """Writes the snapshot `name`; its name, items, bytes and seconds. Raises RunError."""
        async with self._one_at_a_time:
            started = time.monotonic()
            table = self._gate.shelf.table
            items, size = table.size, table.total_bytes
            snapshot = Snapshot(self._gate.shelf.state(), {**self._run, "mark": self._books.accounts.mark()})
            try:
                path = await in_thread(partial(self._snapshots.save, name, snapshot), self._executor)
            except OSError as error:
                self._metrics.snapshot_failures.inc()
                raise RunError(f"cannot write snapshot {name}: {error.strerror}") from error
            seconds = round(time.monotonic() - started, 3)
        self._metrics.snapshots.inc()
        self._report.snapshot = {"name": name, "items": items, "bytes": size, "seconds": seconds}
        log.info("snapshot written", path=str(path), items=items, bytes=size, seconds=seconds)
        return dict(self._report.snapshot)

    async def save_now_and_then(self, seconds: float) -> None:
        """Every `seconds`, for ever; a failure is logged, the next may succeed."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.save("timer")
            except RunError as error:
                log.error("no snapshot", reason=str(error))
