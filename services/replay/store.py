"""The bytes of chunk rows, once each, counted by the items that use them; never looks into them.

Consecutive chunks of one row of one stream form a run. A run holds the newest of its rows for the items still
to come; a row that neither a run nor an item needs is freed at once.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.replay.state import TableState


class KeptRow(NamedTuple):
    """A row that items still to come may use."""

    number: int  # of its chunk, within the stream
    slot: int  # where its bytes are
    td_errors: NDArray[np.float32]  # [T], absolute
    valid: NDArray[np.bool_]  # [T], the steps that count


class Added(NamedTuple):
    """What became of one row of a chunk."""

    complete: tuple[KeptRow, ...] = ()  # the rows of the item that it completes, already counted as used
    gap: bool = False  # numbers were skipped before it; no item spans them
    stale: bool = False  # an older number than the run expects, dropped: delivered again, or overtaken


class _Run:
    def __init__(self, start: int) -> None:
        self.start = start
        self.next = start
        self.tail: deque[KeptRow] = deque()


class _Stream:
    def __init__(self) -> None:
        self.heard = 0.0
        self.runs: dict[int, _Run] = {}  # by row


class ChunkRows:
    """Chunk rows by (stream, row, number): the runs they form, and how many use each."""

    def __init__(self, *, chunks_per_item: int, chunk_stride: int, chunk_steps: int) -> None:
        """Starts empty.

        Args:
            chunks_per_item: consecutive chunks of an item.
            chunk_stride: items start at chunks whose number is a multiple of it.
            chunk_steps: T of a chunk.

        Raises:
            ValueError: one of them is below 1.
        """
        if min(chunks_per_item, chunk_stride, chunk_steps) < 1:
            raise ValueError("chunks_per_item, chunk_stride and chunk_steps must be at least 1")
        self._length, self._stride, self._steps = chunks_per_item, chunk_stride, chunk_steps
        self._rows: list[bytes] = []  # by slot; b"" where free
        self._uses: list[int] = []  # by slot: items, and 1 for the tail of a run
        self._free: list[int] = []
        self._serials: list[int] = []  # by slot: how many rows were stored before it, ever
        self._stored = 0  # rows, ever
        self._streams: dict[str, _Stream] = {}  # the one silent longest first
        self.bytes = 0

    def __len__(self) -> int:
        """Rows there are."""
        return len(self._rows) - len(self._free)

    @property
    def streams(self) -> int:
        """Streams whose runs may go on."""
        return len(self._streams)

    def read(self, slots: Iterable[int]) -> tuple[bytes, ...]:
        """The bytes at `slots`."""
        return tuple([self._rows[slot] for slot in slots])

    def add(
        self,
        stream_id: str,
        row: int,
        number: int,
        *,
        data: bytes,
        td_errors: NDArray[np.float32],
        valid: NDArray[np.bool_],
        now: float,
    ) -> Added:
        """Adds one row of chunk `number`; its item, when complete, is the caller's to `release`.

        Args:
            stream_id: the stream.
            row: which of the stream's rows.
            number: the chunk's number within the stream.
            data: the row's bytes.
            td_errors: [T], absolute.
            valid: [T], the steps that count.
            now: the time in seconds, of which only the order matters here.
        """
        stream = self._heard(stream_id, now)
        run = stream.runs.setdefault(row, _Run(number))
        if number < run.next:
            return Added(stale=True)
        gap = number > run.next
        if gap:
            self._forget(run, number)
            run.start = number
        run.next = number + 1
        run.tail.append(KeptRow(number, self._store(data), td_errors, valid))
        start = run.next - self._length
        complete = tuple(run.tail) if start >= run.start and start % self._stride == 0 else ()
        for kept in complete:
            self._uses[kept.slot] += 1
        self._forget(run, self._first_needed(run))
        return Added(complete, gap)

    def release(self, slots: Iterable[int]) -> None:
        """One user less for each of `slots`; a row without one is freed."""
        for slot in slots:
            self._uses[slot] -= 1
            if not self._uses[slot]:
                self.bytes -= len(self._rows[slot])
                self._rows[slot] = b""
                self._free.append(slot)

    def drop_silent(self, since: float) -> int:
        """Forgets the streams not heard of since then, with the rows only they kept; returns how many.

        Should one speak again, a run starts there.
        """
        dropped = 0
        while self._streams and next(iter(self._streams.values())).heard < since:
            self.drop_most_silent()
            dropped += 1
        return dropped

    def drop_most_silent(self) -> None:
        """Forgets the stream that has been silent longest.

        Raises:
            ValueError: there is no stream.
        """
        if not self._streams:
            raise ValueError("there is no stream to forget")
        for run in self._streams.pop(next(iter(self._streams))).runs.values():
            self._forget(run, run.next)

    def _heard(self, stream_id: str, now: float) -> _Stream:
        stream = self._streams.pop(stream_id, None) or _Stream()
        stream.heard = now
        self._streams[stream_id] = stream
        return stream

    def _first_needed(self, run: _Run) -> int:
        """Where the first item not yet complete starts."""
        earliest = max(run.start, run.next + 1 - self._length)
        return -(-earliest // self._stride) * self._stride

    def _forget(self, run: _Run, before: int) -> None:
        while run.tail and run.tail[0].number < before:
            self.release((run.tail.popleft().slot,))

    def _store(self, data: bytes) -> int:
        self.bytes += len(data)
        if self._free:
            slot = self._free.pop()
            self._rows[slot], self._uses[slot], self._serials[slot] = data, 1, self._stored
        else:
            slot = len(self._rows)
            self._rows.append(data)
            self._uses.append(1)
            self._serials.append(self._stored)
        self._stored += 1
        return slot

    def state(self) -> TableState:
        """The rows and runs as they are now; costs a copy of the indexes, none of the bytes."""
        runs = [
            (index, row, run) for index, s in enumerate(self._streams.values()) for row, run in s.runs.items()
        ]
        tail = [(index, kept) for index, (_, _, run) in enumerate(runs) for kept in run.tail]
        shape = (len(tail), self._steps)
        arrays: dict[str, NDArray[Any]] = {
            "heard": np.array([stream.heard for stream in self._streams.values()], np.float64),
            "runs": np.array(
                [(index, row, run.start, run.next) for index, row, run in runs], np.int64
            ).reshape(-1, 4),
            "tail": np.array([(index, kept.number, kept.slot) for index, kept in tail], np.int64).reshape(
                -1, 3
            ),
            "tail_td_errors": np.array([kept.td_errors for _, kept in tail], np.float32).reshape(shape),
            "tail_valid": np.array([kept.valid for _, kept in tail], np.bool_).reshape(shape),
            "row_serials": np.array(self._serials, np.int64),
            "rows_stored": np.array([self._stored], np.int64),
        }
        return TableState(arrays=arrays, streams=list(self._streams), rows=self._rows.copy())

    def restore(self, state: TableState, used: NDArray[np.int64]) -> None:
        """Takes over what `state` holds; for a store that is still empty.

        Args:
            state: of a store with the same arguments.
            used: [n], the slot of each row of each item.

        Raises:
            ValueError: `state` is not of such a store, or not whole.
        """
        heard = state.array("heard", (len(state.streams),), "f")
        runs = state.array("runs", (None, 4), "i")
        tail = state.array("tail", (None, 3), "i")
        td_errors = state.array("tail_td_errors", (len(tail), self._steps), "f")
        valid = state.array("tail_valid", (len(tail), self._steps), "b")
        serials = state.array("row_serials", (len(state.rows),), "i")
        (stored,) = state.array("rows_stored", (1,), "i").tolist()
        if serials.size and (serials.min() < 0 or serials.max() >= stored):
            raise ValueError("the state's rows have serials that were not given")
        slots = np.concatenate([np.asarray(used, np.int64).ravel(), tail[:, 2]])
        if slots.size and (slots.min() < 0 or slots.max() >= len(state.rows)):
            raise ValueError("the state's items name rows that it does not hold")
        uses: NDArray[Any] = np.bincount(slots, minlength=len(state.rows))
        if any(count and not row for count, row in zip(uses, state.rows, strict=True)):
            raise ValueError("the state's items name rows that it does not hold")
        for names, index in ((state.streams, runs[:, 0]), (runs, tail[:, 0])):
            if index.size and (index.min() < 0 or index.max() >= len(names)):
                raise ValueError("the state's runs name streams that it does not hold")
        self._uses = uses.tolist()
        self._rows = [row if count else b"" for row, count in zip(state.rows, self._uses, strict=True)]
        self._serials, self._stored = serials.tolist(), stored
        self._free = [slot for slot, count in enumerate(self._uses) if not count]
        self.bytes = sum(map(len, self._rows))
        restored = [_Run(int(start)) for start in runs[:, 2]]
        for name, time in zip(state.streams, heard, strict=True):
            self._heard(name, float(time))
        for (stream, row, _, following), run in zip(runs.tolist(), restored, strict=True):
            run.next = following
            self._streams[state.streams[stream]].runs[row] = run
        for (run_index, number, slot), errors, steps in zip(tail.tolist(), td_errors, valid, strict=True):
            restored[run_index].tail.append(KeptRow(number, slot, errors.copy(), steps.copy()))
