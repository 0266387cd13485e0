"""Where inserts and samples wait for one another, first come first served on either side."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.replay.shelf import Shelf
from services.replay.table import Inserted, Sampled
from shared.wire.chunk_rows import Rows


class Waits:
    """For how long there has been somebody who waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting = 0
        self._since = 0.0
        self._seconds = 0.0
        self.ended = clock()  # when the last wait did

    @property
    def is_blocked(self) -> bool:
        """Whether somebody waits now."""
        return self._waiting > 0

    @property
    def seconds(self) -> float:
        """In all, those that still go on included."""
        return self._seconds + (self._clock() - self._since if self._waiting else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block, once for any number of blocks at a time."""
        if not self._waiting:
            self._since = self._clock()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self.ended = self._clock()
                self._seconds += self.ended - self._since


class Gate:
    """Lets inserts and samples at the shelf when its limiter does."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.inserts, self.samples = Waits(), Waits()
        self._turn = {self.inserts: asyncio.Lock(), self.samples: asyncio.Lock()}
        self._changed = asyncio.Event()  # set, and another one taken, at every change

    async def insert(self, rows: Rows) -> Inserted:
        """Inserts a message once that is allowed.

        Raises ConfigurationError and ValueError as `Shelf.admit` and `Shelf.insert`.
        """
        shelf = self.shelf
        shelf.admit(len(rows.records))
        async with self._turn[self.inserts]:
            await self._until(lambda: shelf.may_insert(len(rows.records)), self.inserts)
            inserted = shelf.insert(rows, now=time.time())
        self._tell()
        return inserted

    async def sample(self, n: int) -> Sampled:
        """Draws n sequences once that is allowed. Raises Refused when it never will be."""
        shelf = self.shelf

        def may_sample() -> bool:
            shelf.check_sample(n)  # each time: larger messages leave room for smaller samples only
            return shelf.may_sample(n)

        async with self._turn[self.samples]:
            await self._until(may_sample, self.samples)
            sampled = shelf.sample(n, now=time.time())
        self._tell()
        return sampled

    async def _until(self, allowed: Callable[[], bool], waits: Waits) -> None:
        if allowed():
            return
        with waits.waiting():
            while not allowed():
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
