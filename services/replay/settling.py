"""Replay's settling of messages: no more of them in hand than a bound."""

from concurrent.futures import Executor
from pathlib import Path

from services.replay.accounts import Accounts, Outcome
from shared.settling import Claim, Settling


class Bookkeeper(Settling[Accounts]):
    """Settles messages beside the inserts."""

    def __init__(
        self,
        accounts: Accounts,
        directory: Path,
        executor: Executor,
        *,
        claim: Claim,
        most: int,
    ) -> None:
        super().__init__(accounts, directory, executor, claim=claim)
        self._most = most

    async def has_room(self, count: int) -> None:
        """Waits until `count` more messages in hand are no more than `most`."""
        async with self._settled:
            await self._settled.wait_for(lambda: len(self._held) + count <= self._most)

    def count(self, outcome: Outcome) -> None:
        """Counts a message in hand that is done with."""
        held = self._held[outcome.sequence]
        self.accounts.count([outcome._replace(redelivered=held.redelivered)])
        self._finish([outcome.sequence])
