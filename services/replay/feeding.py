"""From the work queue to the shelf: fetching, taking apart, inserting, beside the samples."""

import asyncio
import time
from concurrent.futures import Executor
from functools import partial

from services.replay.accounts import Outcome, Reason
from services.replay.gate import Gate
from services.replay.intake import check_rows
from services.replay.metrics import ReplayMetrics
from services.replay.settling import Bookkeeper
from services.replay.silence import Silence
from shared.bus.work_queue import QueueConsumer, QueueMessage
from shared.errors import ChunkError
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.telemetry import get_logger
from shared.wire.chunk_rows import Rows, split_message

FETCH_SECONDS = 1.0
MESSAGES_IN_HAND = 16
"""So many at most are taken from the queue and not acknowledged yet; while inserts wait they stay there."""
_FETCHED = MESSAGES_IN_HAND // 2  # at once: while these are inserted, the next ones come

log = get_logger(__name__)


class Feeder:
    """Inserts what the queue holds, in its order."""

    def __init__(
        self,
        consumer: QueueConsumer,
        gate: Gate,
        books: Bookkeeper,
        metrics: ReplayMetrics,
        executor: Executor,
        *,
        spec: RunSpec,
        run_id: str,
    ) -> None:
        self._consumer = consumer
        self._gate = gate
        self._books = books
        self._metrics = metrics
        self._executor = executor
        self._check = partial(check_rows, spec=spec, run_id=run_id)
        self._silence = Silence(time.time())

    async def run(self) -> None:
        """Inserts for ever. Raises ConfigurationError when the error buffer is too small for a message."""
        await self._consumer.take_over()  # chunks that newer ones overtake are worth nothing
        fetching = asyncio.create_task(self._fetched())
        try:
            while True:
                taken = await fetching
                fetching = asyncio.create_task(self._fetched())  # while these are inserted
                for message, rows in taken:
                    await self._insert(message, rows)
                if taken:
                    self._forget_silent()
        finally:
            fetching.cancel()
            await asyncio.wait([fetching])

    async def _fetched(self) -> list[tuple[QueueMessage, Rows | Outcome]]:
        await self._books.has_room(_FETCHED)
        messages = await self._consumer.fetch(_FETCHED, FETCH_SECONDS)
        new = [message for message in messages if self._books.hold(message)]
        rows = await in_thread(lambda: [self._rows_in(message) for message in new], self._executor)
        return list(zip(new, rows, strict=True))

    def _rows_in(self, message: QueueMessage) -> Rows | Outcome:
        """The rows in `message`, or the refusal of what is none or not this run's."""
        reason: Reason = "undecodable"
        steps = 0
        try:
            rows = split_message(message.data)
            reason, steps = "spec", rows.outline.steps
            self._check(rows)
        except ChunkError as error:
            log.warning("chunk refused", sequence=message.sequence, reason=reason, words=str(error))
            return Outcome(message.sequence, reason, steps)
        return rows

    async def _insert(self, message: QueueMessage, rows: Rows | Outcome) -> None:
        if isinstance(rows, Outcome):
            self._books.count(rows)
            return
        steps = rows.outline.steps
        self._silence.heard(rows.header.stream_id, time.time())
        try:
            inserted = await self._gate.insert(rows)
        except ValueError as error:
            log.warning("chunk refused", sequence=message.sequence, reason="too_large", words=str(error))
            self._books.count(Outcome(message.sequence, "too_large", steps))
            return
        self._silence.deaf(time.time())
        if not self._books.is_returning(message.sequence):
            self._books.accounts.inserted_items += inserted.items
        self._books.count(Outcome(message.sequence, None, steps))
        self._metrics.inserted(inserted)

    def _forget_silent(self) -> None:
        """Frees what streams that ended have left; one that merely could not be heard is none of them."""
        since = self._silence.ended_before(time.time())
        if since is not None:
            self._gate.shelf.table.drop_silent(since)
