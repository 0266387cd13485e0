"""The learner settles messages beside the training; when weights must wait for the journal."""

from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

from services.learner.accounts import Accounts
from services.learner.rows import Outcome
from shared.settling import Claim, Settling


class Bookkeeper(Settling[Accounts]):
    """Settles messages beside the training."""

    def __init__(
        self,
        accounts: Accounts,
        run_dir: Path,
        executor: Executor,
        *,
        claim: Claim,
    ) -> None:
        super().__init__(accounts, run_dir, executor, claim=claim)
        self.journaled_updates = accounts.updates  # those that the journal knows of

    def count(self, outcomes: Iterable[Outcome], *, updates: int | None = None) -> None:
        """Counts messages in hand that are done with, and the update that was done with them."""
        known = [outcome._replace(**self._of_message(outcome.sequence)) for outcome in outcomes]
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
            await self._settled.wait_for(lambda: self.journaled_updates >= updates)

    async def steps_for_checkpoint(self) -> int:
        """The steps that the journal knows of: all, unless another process may write it by now.

        Of steps that the checkpoint alone knew, the messages would come back and be counted once more.
        """
        if self._claim.is_certain:
            await self.write()
        return self.journaled_steps

    async def write(self, *, durable: bool = False) -> None:
        """As the base's."""
        updates = self.accounts.updates
        await super().write(durable=durable)
        async with self._settled:
            self.journaled_updates = updates
            self._settled.notify_all()
