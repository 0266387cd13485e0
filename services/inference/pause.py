"""Whether the run is paused; kept in the run's bucket, since no restart of inference shall end a pause."""

import asyncio

from services.inference.agreement import Agreement
from shared.bus.connection import Bus
from shared.bus.key_values import KEEP_SECONDS, keep_paused, kept_paused

_PAUSE = "pause"


class Pause:
    """While it `is_on` no batch leaves. Each inference service of a run is told, and keeps the same."""

    def __init__(self, bus: Bus, agreement: Agreement) -> None:
        self.is_on = False
        self._bus = bus
        self._agreement = agreement
        self._was_told = False
        self._turn = asyncio.Lock()

    async def restore(self) -> None:
        """Goes on with what the run was told last; to be called with an engine, before its first weights."""
        found = await kept_paused(self._bus)
        if not self._was_told:  # meanwhile, which is newer
            self.is_on = found
        self._apply()

    async def tell(self, *, is_on: bool) -> None:
        """Pauses or goes on at once; returns when that outlasts this service."""
        self.is_on, self._was_told = is_on, True
        self._apply()
        async with self._turn:
            await keep_paused(self._bus, self.is_on)  # the newest, whatever has been told since

    async def keep(self) -> None:
        """Puts a pause back, for ever, where NATS lost it with its store."""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            async with self._turn:
                if self.is_on and not await kept_paused(self._bus):
                    await keep_paused(self._bus, self.is_on)

    def _apply(self) -> None:
        if (engine := self._agreement.engine) is None:
            return
        if self.is_on:
            engine.dispatcher.block(_PAUSE)
        else:
            engine.dispatcher.unblock(_PAUSE)
