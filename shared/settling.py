"""Counting, then the journal, then the acknowledgement: in this order, beside the work on messages."""

import asyncio
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from shared.accounts import MessageAccounts, write_accounts
from shared.bus.work_queue import ACK_WAIT_SECONDS, QueueMessage
from shared.errors import RunError
from shared.runtime import in_thread
from shared.telemetry import get_logger

_REMEMBERED = 10_000
_RETRY_SECONDS = 1.0

log = get_logger(__name__)

A = TypeVar("A", bound=MessageAccounts[Any])


class Claim(Protocol):
    """That the messages are this process's alone to settle: one that stood still may have a successor."""

    @property
    def is_certain(self) -> bool:
        """Whether they are, now."""

    async def confirmed(self) -> None:
        """Returns once it is certain that they are, and raises when they no longer are."""


class Settling(Generic[A]):
    """Holds the messages in hand, and settles those that are done with.

    Whatever is counted while one journal is written and its messages are acknowledged goes into the next
    one. How much that can be is bounded by the messages in hand.
    """

    def __init__(
        self,
        accounts: A,
        directory: Path,
        executor: Executor,
        *,
        claim: Claim,
    ) -> None:
        """`directory` is the journal's."""
        self.accounts = accounts
        self._directory = directory
        self._executor = executor
        self._claim = claim
        self._held: dict[int, QueueMessage] = {}
        self._finished: list[int] = []  # sequences to acknowledge after the next journal
        self._acknowledged: deque[tuple[int, datetime]] = deque(maxlen=_REMEMBERED)
        self._wake = asyncio.Event()
        self._settled = asyncio.Condition()
        self._is_settled = True
        self.trouble = ""  # why the journal cannot be written
        self.journaled_steps = accounts.steps  # those that the journal knows of

    @property
    def held(self) -> int:
        """Messages in hand."""
        return len(self._held)

    def hold(self, message: QueueMessage) -> bool:
        """Takes a message in hand; False when it was counted before, as a server that crashed may forget
        an acknowledgement: it is acknowledged again.
        """
        self._held[message.sequence] = message
        if message.redelivered and (message.sequence, message.kept_at) in self._acknowledged:
            self._finish([message.sequence])
            return False
        return True

    async def run(self) -> None:
        """Settles whatever is counted, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._settle()

    async def keep_alive(self, interval_seconds: float = ACK_WAIT_SECONDS / 3) -> None:
        """Tells the queue, for ever, that the messages in hand are being worked on."""
        while True:
            await asyncio.sleep(interval_seconds)
            for message in list(self._held.values()):
                await message.in_progress()

    async def settled(self) -> None:
        """Waits until all that was counted is in the journal and acknowledged."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._is_settled)

    async def write(self, *, durable: bool = False) -> None:
        """Writes the journal now; `durable`: to the disk."""
        data, steps = self.accounts.to_json(), self.accounts.steps
        await in_thread(partial(write_accounts, self._directory, data, durable=durable), self._executor)
        self.journaled_steps = steps

    async def close(self) -> None:
        """Writes the journal to the disk, and gives the messages in hand back to the queue.

        They are given back also where it cannot be written; raises RunError then.
        """
        try:
            await self.write(durable=True)
        finally:
            for message in list(self._held.values()):
                if message.sequence not in self.accounts.pending:
                    await message.nak()

    async def _write_at_last(self) -> None:
        """Tries until there is room. Until then nothing is acknowledged, so the queue fills up."""
        while True:
            await self._claim.confirmed()
            try:
                await self.write()
            except RunError as error:
                if not self.trouble:
                    log.error("trying again", reason=str(error))
                self.trouble = str(error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.trouble = ""
                return

    def _of_message(self, sequence: int) -> dict[str, Any]:
        """What an outcome says of its message, which is in hand."""
        message = self._held[sequence]
        return {"redelivered": message.redelivered, "kept_at": kept_at_of(message)}

    def _finish(self, sequences: Iterable[int]) -> None:
        self._finished.extend(sequences)
        self._is_settled = False
        self._wake.set()

    async def _settle(self) -> None:
        sequences, self._finished = self._finished, []
        await self._write_at_last()
        await self._claim.confirmed()
        async with asyncio.TaskGroup() as group:
            for sequence in sequences:
                group.create_task(self._held[sequence].ack())
        for sequence in sequences:
            self._acknowledged.append((sequence, self._held.pop(sequence).kept_at))
        self.accounts.confirm(sequences)
        async with self._settled:
            self._is_settled = not self._wake.is_set()
            self._settled.notify_all()


def kept_at_of(message: QueueMessage) -> int:
    """When the queue took a message, in µs since the epoch."""
    return round(message.kept_at.timestamp() * 1e6)
