"""One batch is prepared while another is trained; knows neither what a batch is nor where it comes from."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Generic, TypeVar

P = TypeVar("P")


class Prefetching(ABC, Generic[P]):
    """Prepares batches one at a time, so that no more than one waits while another is trained."""

    def __init__(self) -> None:
        self.has_seen_chunks = False
        self._may_prepare = asyncio.Semaphore(1)
        self._prepared: asyncio.Queue[P] = asyncio.Queue()  # one at most, by the semaphore

    @abstractmethod
    async def prepare(self, update: int) -> P:
        """The batch for the update that follows `update` completed ones; waits for what it is made of."""

    @abstractmethod
    def count(self, prepared: P, *, updates: int) -> None:
        """`prepared` was trained by the last of `updates` updates of the run."""

    async def sent(self) -> None:
        """Waits until what `count` was given has reached those whom it concerns, other than the accounts."""

    async def run(self, updates: int) -> None:
        """Prepares batches for ever, the first for the update that follows `updates` completed ones."""
        for update in itertools.count(updates):
            await self._may_prepare.acquire()
            self._prepared.put_nowait(await self.prepare(update))

    async def next_within(self, seconds: float) -> P | None:
        """The next batch; None when there is none within `seconds`. The one after it begins with this."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                prepared = await self._prepared.get()
            self._may_prepare.release()
            return prepared
        return None
