"""From replay to batches on the device, and priorities back to replay, beside the training."""

import asyncio
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from services.learner.config import LearnerConfig
from services.learner.intake import StateLayout, check_chunk
from services.learner.prefetching import Prefetching
from services.learner.r2d2 import R2D2Trainer
from services.learner.sequences import SequenceBatch, Shape, staged_sequences
from services.learner.settling import Bookkeeper
from shared.algorithms.priorities import importance_weights
from shared.bus.replay import ReplaySample
from shared.errors import ChunkError, ConfigurationError
from shared.runtime import in_thread
from shared.specs import RunSpec

_UNANSWERED_UPDATES = 10  # sampled, their priorities not taken by replay yet; then no more are sampled


class Replay(Protocol):
    """What the learner needs of replay; see `shared.bus.replay.ReplayClient`."""

    async def sample(self, batch_size: int) -> ReplaySample:
        """Sequences chosen by their priorities; waits while there are none to be had."""

    async def update_priorities(self, keys: NDArray[np.uint64], priorities: NDArray[np.float64]) -> None:
        """Returns once replay has them."""

    async def snapshot(self, name: str) -> dict[str, Any]:
        """Returns once replay has written it."""


class PreparedSequences(NamedTuple):
    """One update's batch, whose priorities change with it."""

    batch: SequenceBatch
    keys: NDArray[np.uint64]  # [B]
    lags: list[int]  # [B], updates between each sequence's oldest weights and the update that trains it


class SequenceFeeder(Prefetching[PreparedSequences]):
    """Prepares batches of replay's sequences, and sends the priorities that training gave them."""

    def __init__(
        self,
        replay: Replay,
        trainer: R2D2Trainer,
        books: Bookkeeper,
        executor: Executor,
        *,
        config: LearnerConfig,
        spec: RunSpec,
        state: StateLayout,
    ) -> None:
        super().__init__()
        self._replay = replay
        self._trainer = trainer
        self._books = books
        self._executor = executor
        self._config = config
        self._spec = spec
        self._state = state
        self._shape = Shape(config.unroll, config.burn_in, config.sequence_length)
        self._may_sample = asyncio.Semaphore(_UNANSWERED_UPDATES)
        self._unsent: asyncio.Queue[tuple[NDArray[np.uint64], NDArray[np.float64]]] = (
            asyncio.Queue()  # bounded by what was sampled
        )

    async def prepare(self, update: int) -> PreparedSequences:
        """A batch that replay gives. Raises ConfigurationError when its sequences are not this run's."""
        await self._may_sample.acquire()
        sample = await self._replay.sample(self._config.batch_size)
        self.has_seen_chunks = True
        return await in_thread(partial(self._staged, sample, update), self._executor)

    def count(self, prepared: PreparedSequences, *, updates: int) -> None:
        """The sequences count as trained, and their new priorities are on their way."""
        self._books.accounts.count_sequences(prepared.lags)
        self._books.count((), updates=updates)
        self._unsent.put_nowait((prepared.keys, self._trainer.priorities))

    async def send_priorities(self) -> None:
        """Sends what `count` was given, for ever."""
        while True:
            keys, priorities = await self._unsent.get()
            try:
                await self._replay.update_priorities(keys, priorities)
            finally:
                self._unsent.task_done()
                self._may_sample.release()

    async def sent(self) -> None:
        """Waits until replay has all priorities."""
        await self._unsent.join()

    def _staged(self, sample: ReplaySample, update: int) -> PreparedSequences:
        try:
            for chunks in sample.sequences:
                for chunk in chunks:
                    check_chunk(chunk, self._spec, self._state, run_id=self._config.run_id)
            weights = importance_weights(sample.probabilities, sample.size, self._config.importance_exponent)
            batch = staged_sequences(
                sample.sequences,
                weights,
                self._shape,
                reward_clip=self._spec.reward_clip,
                device=self._trainer.device,
            )
        except ChunkError as error:
            raise ConfigurationError(f"replay gives sequences that are not this run's: {error}") from error
        oldest = [min(int(chunk.weights_update.min()) for chunk in chunks) for chunks in sample.sequences]
        return PreparedSequences(batch, sample.keys, [max(0, update - each) for each in oldest])
