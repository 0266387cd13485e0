"""Publishes weights, newest first: what became old while a publication ran is never sent."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from shared.bus.connection import Bus
from shared.bus.key_values import KEEP_SECONDS
from shared.bus.weights import has_weights, publish_weights
from shared.errors import ConnectionFailed

_PAUSES = 9.0  # seconds without, for each second of publishing
_LONGEST_PAUSE_SECONDS = 5.0


class Snapshot(NamedTuple):
    """Weights as bytes, between two updates."""

    data: bytes
    update: int


class WeightsPublisher:
    """Publishes a snapshot whenever one is offered since the last, but not all the time.

    Between two publications lie at least `interval_seconds`, and nine times what the quicker of the last two
    took: what weights cost, here, in NATS and in inference, grows with their size, what a late update costs
    does not. One that took long once, as where the machine stood still, says nothing of that.

    A snapshot is published once the journal knows of its update (`journaled`): so the update count that
    chunks bring back is never ahead of the count that a restart begins with.
    """

    def __init__(
        self,
        bus: Bus,
        snapshot: Callable[[], Awaitable[Snapshot]],
        *,
        journaled: Callable[[int], Awaitable[None]],
        on_version: Callable[[int], None],
        network_hash: str,
        interval_seconds: float,
    ) -> None:
        """`on_version` hears of each publication's version."""
        self.version = 0  # of the newest publication
        self.update = -1  # of the newest publication
        self.trouble = ""  # why NATS does not take the next one
        self._bus = bus
        self._snapshot = snapshot
        self._journaled = journaled
        self._on_version = on_version
        self._network_hash = network_hash
        self._interval = interval_seconds
        self._is_publishing = False
        self._wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._published = asyncio.Condition()

    def offer(self) -> None:
        """There are newer weights."""
        self._wanted.set()

    async def run(self) -> None:
        """Publishes whatever is offered, for ever."""
        before = math.inf
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            took = await self._publish()
            with suppress(TimeoutError):
                pause = min(_PAUSES * min(took, before), _LONGEST_PAUSE_SECONDS)
                async with asyncio.timeout(max(self._interval - took, pause)):
                    await self._hurry.wait()
            before = took

    async def keep(self) -> None:
        """Publishes again, for ever, when NATS lost the newest weights: its store, or them alone.

        An update may never come: a new inference without weights makes no trajectories.
        """
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            is_there = partial(has_weights, self._bus, self.version)
            if self.version and not self._is_publishing and not await self._bus.persistently(is_there):
                self.offer()

    async def published(self, update: int) -> None:
        """Waits until weights of `update` or a later one are published; from now on without intervals."""
        self._hurry.set()
        self.offer()
        async with self._published:
            await self._published.wait_for(lambda: self.update >= update)

    async def _publish(self) -> float:
        """Publishes once; the seconds it took, not counting those for which the server was away."""
        snapshot = await self._snapshot()
        await self._journaled(snapshot.update)
        clock = asyncio.get_running_loop().time

        async def publish() -> tuple[int, float]:
            started = clock()
            try:
                version = await publish_weights(
                    self._bus, snapshot.data, update=snapshot.update, network_hash=self._network_hash
                )
            except ConnectionFailed as error:
                self.trouble = str(error)
                raise
            self.trouble = ""
            return version, clock() - started

        self._is_publishing = True
        try:
            self.version, took = await self._bus.persistently(publish)
        finally:
            self._is_publishing = False
        self._on_version(self.version)
        async with self._published:
            self.update = snapshot.update
            self._published.notify_all()
        return took
