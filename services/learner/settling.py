"""The learner settles messages beside the training; when weights must wait for the journal."""

from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path

from services.learner.accounts import Accounts
from services.learner.rows import Outcome
from shared.settling import Settling


class Bookkeeper(Settling[Accounts]):
    """Settles messages beside the training."""

    def __init__(
        self,
        accounts: Accounts,
        run_dir: Path,
        executor: Executor,
        *,
        confirmed: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(accounts, run_dir, executor, confirmed=confirmed)
        self._journaled_updates = -1

    def count(self, outcomes: Iterable[Outcome], *, updates: int | None = None) -> None:
        """Counts messages in hand that are done with, and the update that was done with them."""
        known = [
            outcome._replace(redelivered=self._held[outcome.sequence].redelivered) for outcome in outcomes
        ]
        if updates is not None:
            self.accounts.updates = updates
        if known or updates is not None:
            self.accounts.count(known)
            self._finish(outcome.sequence for outcome in known)

    def write_soon(self) -> None:
        """Writes the journal though no message is done with: something else in the accounts changed."""
        self._finish(())

    async def journaled(self, updates: int) -> None:
        """Waits until the journal says that `updates` updates were done."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._journaled_updates >= updates)

    async def write(self, *, durable: bool = False) -> None:
        """As the base's."""
        updates = self.accounts.updates
        await super().write(durable=durable)
        async with self._settled:
            self._journaled_updates = updates
            self._settled.notify_all()
