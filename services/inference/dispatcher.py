"""Brings requests to the model in batches and the answers back; lives on the event loop."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from services.inference.assembler import ChunkStart, StepArrays
from services.inference.batcher import Batch, Batcher, Entry
from services.inference.metrics import InferenceMetrics
from services.inference.model import Answers, PackedBatch
from services.inference.slots import Slots
from services.inference.staging import Staging, StagingPool
from shared.types import Array

_MOST_RUNNING = 2  # batches given to the model: one that runs and a full one behind it


class Asker(Protocol):
    """A group of environments, as far as batching is concerned."""

    @property
    def rows(self) -> int:
        """B."""

    @property
    def slots(self) -> Slots:
        """[B] where the device remembers these environments."""

    @property
    def greedy(self) -> bool:
        """Whether it acts greedily."""

    @property
    def epsilon(self) -> Array:
        """[B] how often each environment acts at random (R2D2)."""

    @property
    def wants_start(self) -> bool:
        """Whether the answer shall come with a ChunkStart."""


class Answer(NamedTuple):
    """What the policy says to one group."""

    action: Array  # [B] int64
    logits: Array  # [B, A] float32; R2D2: Q-values
    start: ChunkStart | None
    weights_version: int
    weights_update: int


class Dispatcher:
    """Requests are packed into host memory as they come, while the device is busy with the batch before.

    While it is `block`ed no batch leaves, whatever waits. A failure of the model is the result of `failed`.
    """

    def __init__(
        self,
        *,
        run: Callable[[PackedBatch], "asyncio.Future[Answers]"],
        pool: StagingPool,
        batcher: Batcher[Asker],
        metrics: InferenceMetrics,
    ) -> None:
        self._run = run
        self._pool = pool
        self._batcher = batcher
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._staged: dict[Batch[Asker], Staging] = {}
        self._waiting: dict[Asker, asyncio.Future[Answer]] = {}
        self._running = 0
        self._blocks: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._failure: asyncio.Future[None] = self._loop.create_future()

    async def failed(self) -> None:
        """Raises what the model raised; waits for ever while it raises nothing."""
        await self._failure

    def block(self, reason: str) -> None:
        """From now on no batch leaves, until `unblock` with the same reason."""
        self._blocks.add(reason)
        self._pump()

    def unblock(self, reason: str) -> None:
        """Ends `block`."""
        self._blocks.discard(reason)
        self._pump()

    def expect(self, asker: Asker) -> None:
        """`asker` is about to be answered, or welcomed, and owes a request from now on."""
        self._batcher.expect(asker)

    def ask(self, asker: Asker, step: StepArrays) -> "asyncio.Future[Answer]":
        """The future of the answer; the step is copied before this returns, save frames in place."""
        batch, entry = self._batcher.add(asker, asker.rows, self._loop.time())
        staging = self._staged.get(batch)
        if staging is None:
            staging = self._staged[batch] = self._pool.take(asker.rows)
        staging.place(entry.offset, step, slots=asker.slots, greedy=asker.greedy, epsilon=asker.epsilon)
        future = self._waiting[asker] = self._loop.create_future()
        self._pump()
        return future

    def forget(self, asker: Asker) -> None:
        """`asker` is gone; whatever it asked is not computed any more, unless it is on its way already."""
        self._waiting.pop(asker, None)
        removed = self._batcher.forget(asker)
        if removed is not None:
            batch, gone = removed
            if batch.entries:
                self._staged[batch].close_gap(gone.offset, gone.rows, end=batch.rows + gone.rows)
            else:
                self._pool.give(self._staged.pop(batch))
        self._pump()

    def _pump(self) -> None:
        """Sends off what may leave now, and comes back when the next batch may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while not self._blocks and self._may_leave():
            self._send(self._batcher.take())
        deadline = self._batcher.deadline()
        if deadline is not None and not self._blocks and self._running == 0:
            self._timer = self._loop.call_at(deadline, self._pump)

    def _may_leave(self) -> bool:
        if self._running == 0:
            return self._batcher.ready(self._loop.time())
        # The device is busy, so more may gather; a full batch need not wait for the loop to hear of its end.
        return self._running < _MOST_RUNNING and self._batcher.is_full

    def _send(self, batch: Batch[Asker]) -> None:
        staging = self._staged.pop(batch)
        starting = [entry for entry in batch.entries if entry.key.wants_start]
        starts = [np.arange(entry.offset, entry.offset + entry.rows) for entry in starting]
        self._metrics.batches.add(1)
        self._metrics.rows.add(batch.rows)
        self._metrics.batch_rows.observe(batch.rows)
        self._metrics.batch_wait.observe(max(0.0, self._loop.time() - batch.oldest))
        packed = PackedBatch(staging, batch.rows, np.concatenate(starts) if starts else None)
        self._running += 1
        self._run(packed).add_done_callback(partial(self._on_answers, batch, starting, staging))

    def _on_answers(
        self,
        batch: Batch[Asker],
        starting: list[Entry[Asker]],
        staging: Staging,
        future: "asyncio.Future[Answers]",
    ) -> None:
        self._running -= 1
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            if not self._failure.done():
                self._failure.set_exception(error)
            return
        self._pool.give(staging)
        answers = future.result()
        self._metrics.inference.observe(answers.seconds)
        places = _places(starting)
        for entry in batch.entries:
            waiting = self._waiting.pop(entry.key, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(_part(answers, entry, places.get(entry.key)))
        # After those who were answered have said whether they owe the next request.
        self._loop.call_soon(self._pump)


def _places(starting: list[Entry[Asker]]) -> dict[Asker, slice]:
    """Where each group's rows are among those whose ChunkStart was wanted."""
    places = {}
    begin = 0
    for entry in starting:
        places[entry.key] = slice(begin, begin + entry.rows)
        begin += entry.rows
    return places


def _part(answers: Answers, entry: Entry[Asker], place: slice | None) -> Answer:
    rows = slice(entry.offset, entry.offset + entry.rows)
    start = None
    if place is not None and answers.start is not None:
        start = ChunkStart(
            state=tuple(leaf[place] for leaf in answers.start.state),
            previous_action=answers.start.previous_action[place],
            previous_reward=answers.start.previous_reward[place],
        )
    return Answer(
        action=answers.action[rows],
        logits=answers.logits[rows],
        start=start,
        weights_version=answers.weights_version,
        weights_update=answers.weights_update,
    )
