"""From the work queue to batches on the device: fetching, decoding and staging, beside the training."""

from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

import torch

from services.learner.batches import TrainingBatch, staged
from services.learner.intake import StateLayout, check_chunk
from services.learner.prefetching import Prefetching
from services.learner.rows import Outcome, Reason, RowBatch, RowQueue
from services.learner.settling import Bookkeeper
from shared.bus.work_queue import QueueConsumer, QueueMessage
from shared.errors import ChunkError
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.telemetry import get_logger
from shared.types import Chunk
from shared.wire.chunks import decode_chunk

FETCH_SECONDS = 1.0

log = get_logger(__name__)


class Prepared(NamedTuple):
    """One update's batch, and the messages that are done with once it was trained."""

    batch: TrainingBatch
    finished: tuple[Outcome, ...]


class Feeder(Prefetching[Prepared]):
    """Prepares batches of the work queue's trajectories.

    It fetches only while rows of the next batch are missing. What it takes in hand is therefore bounded by
    the batch in training, the one prepared, and what is left of one message.
    """

    def __init__(
        self,
        consumer: QueueConsumer,
        rows: RowQueue,
        books: Bookkeeper,
        executor: Executor,
        *,
        spec: RunSpec,
        state: StateLayout,
        run_id: str,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._consumer = consumer
        self._rows = rows
        self._books = books
        self._executor = executor
        self._check = partial(check_chunk, spec=spec, state=state, run_id=run_id)
        self._reward_clip = spec.reward_clip
        self._device = device
        self._largest_message = 1  # rows

    async def run(self, updates: int) -> None:
        """As the base's."""
        await self._consumer.take_over()
        await super().run(updates)

    async def prepare(self, update: int) -> Prepared:
        """The batch for the update that follows `update` completed ones; waits for its rows."""
        while (rows := self._taken(update)) is None:
            await self._fetch()
        stage = partial(staged, rows.slices, reward_clip=self._reward_clip, device=self._device)
        return Prepared(await in_thread(stage, self._executor), rows.finished)

    def count(self, prepared: Prepared, *, updates: int) -> None:
        """What was trained with it is acknowledged."""
        self._books.count(prepared.finished, updates=updates)

    def _taken(self, update: int) -> RowBatch | None:
        batch = self._rows.take(update)
        self._books.count(self._rows.take_refused())
        return batch

    async def _fetch(self) -> None:
        # With as many rows as any message before had, these hold no more than the rows that are missing.
        count = -(-self._rows.missing // self._largest_message)
        messages = await self._consumer.fetch(count, FETCH_SECONDS)
        new = [message for message in messages if self._books.hold(message)]
        if not new:
            return
        chunks = await in_thread(lambda: [self._chunk_in(message) for message in new], self._executor)
        for message, chunk in zip(new, chunks, strict=True):
            if isinstance(chunk, Chunk):
                self.has_seen_chunks = True
                self._largest_message = max(self._largest_message, chunk.rows)
                self._rows.add(message.sequence, chunk)
            else:
                self._books.count([chunk])

    def _chunk_in(self, message: QueueMessage) -> Chunk | Outcome:
        """The chunk in `message`, or the refusal of what is none or not this run's."""
        reason: Reason = "undecodable"
        steps = 0
        try:
            chunk = decode_chunk(message.data)
            reason, steps = "spec", chunk.steps
            self._check(chunk)
        except ChunkError as error:
            log.warning("chunk refused", sequence=message.sequence, reason=reason, words=str(error))
            return Outcome(message.sequence, reason, steps)
        return chunk
