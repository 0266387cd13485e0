"""Replay's settling of messages: no more of them in hand than a bound."""

from concurrent.futures import Executor
from pathlib import Path

from services.replay.accounts import Accounts, Outcome
from shared.settling import Claim, Settling, kept_at_of


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
        self.accounts.count([outcome._replace(**self._of_message(outcome.sequence))])
        self._finish([outcome.sequence])

    def is_returning(self, sequence: int) -> bool:
        """Whether what was inserted of this message in hand was counted before a crash."""
        return self.accounts.is_returning(sequence, kept_at_of(self._held[sequence]))
