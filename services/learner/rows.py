"""From messages of any number of rows to batches of a fixed one; knows neither tensors nor NATS.

A message is finished when its last row was trained, or when it is refused. It may be split over several
batches. Everything here counts in messages and rows; time does not occur, lag is counted in updates.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from shared.types import Chunk

# lag: its weights are too old; spec: another network or unroll than the run's; undecodable: no chunk at all;
# lost: it left the queue without reaching the learner's accounts.
Reason = Literal["lag", "spec", "undecodable", "lost"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Outcome(NamedTuple):
    """What became of one message of the work queue."""

    sequence: int  # its sequence in the queue
    reason: Reason | None  # why it was refused; None: trained
    steps: int = 0  # environment steps in it, reset steps excluded
    lag: int = 0  # updates between its oldest weights and the update that trained (the last of) it
    redelivered: bool = False  # it was delivered more than once
    kept_at: int = 0  # when the queue took it, µs since the epoch: sequences may begin anew; 0: not known


class Slice(NamedTuple):
    """Rows `start` to `stop` of a chunk."""

    chunk: Chunk
    start: int
    stop: int


class RowBatch(NamedTuple):
    """The rows of one update, in the order of the queue."""

    slices: tuple[Slice, ...]
    finished: tuple[Outcome, ...]  # messages whose last row is in this batch


@dataclass
class _Waiting:
    sequence: int
    chunk: Chunk
    oldest_update: int
    used: int = 0  # rows already given away

    @property
    def left(self) -> int:
        return self.chunk.rows - self.used

    def outcome(self, reason: Reason | None, lag: int) -> Outcome:
        return Outcome(self.sequence, reason, self.chunk.steps, lag)


class RowQueue:
    """Rows that wait for their batch, first in, first out.

    It is not bounded itself: whoever fills it fetches only while `rows` is less than a batch.
    """

    def __init__(self, *, batch_size: int, max_policy_lag: int) -> None:
        self._batch_size = batch_size
        self._max_policy_lag = max_policy_lag
        self._waiting: deque[_Waiting] = deque()
        self._refused: list[Outcome] = []

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(message.left for message in self._waiting)

    @property
    def missing(self) -> int:
        """Rows that a batch still lacks; 0 when there is one."""
        return max(0, self._batch_size - self.rows)

    def add(self, sequence: int, chunk: Chunk) -> None:
        """Appends the message `sequence` that holds `chunk`."""
        self._waiting.append(_Waiting(sequence, chunk, int(chunk.weights_update.min())))

    def take(self, update: int) -> RowBatch | None:
        """The batch for the update that follows `update` completed ones, or None while rows are missing.

        Before that, every message (or rest of one) that would be more than `max_policy_lag` updates old
        is refused; so no batch holds an older one.
        """
        self._refuse_stale(update)
        if self.missing:
            return None
        slices, finished = [], []
        needed = self._batch_size
        while needed:
            message = self._waiting[0]
            count = min(needed, message.left)
            slices.append(Slice(message.chunk, message.used, message.used + count))
            message.used += count
            needed -= count
            if not message.left:
                finished.append(message.outcome(None, self._lag(message, update)))
                self._waiting.popleft()
        return RowBatch(tuple(slices), tuple(finished))

    def take_refused(self) -> tuple[Outcome, ...]:
        """The messages refused since the last call."""
        refused, self._refused = tuple(self._refused), []
        return refused

    def _refuse_stale(self, update: int) -> None:
        fresh: deque[_Waiting] = deque()
        for message in self._waiting:
            lag = self._lag(message, update)
            if lag > self._max_policy_lag:
                self._refused.append(message.outcome("lag", lag))
            else:
                fresh.append(message)
        self._waiting = fresh

    @staticmethod
    def _lag(message: _Waiting, update: int) -> int:
        return max(0, update - message.oldest_update)
