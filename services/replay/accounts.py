"""The accounts of replay: messages (`shared/accounts.py`), and what a restored table lost of them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from shared.accounts import MessageAccounts, read_accounts

# spec: another network, unroll or run; undecodable: no chunk of R2D2 at all; too_large: more than the whole
# table holds; lost: it left the queue without reaching these accounts.
Reason = Literal["spec", "undecodable", "too_large", "lost"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Outcome(NamedTuple):
    """What became of one message of the work queue."""

    sequence: int  # its sequence in the queue
    reason: Reason | None  # why it was refused; None: inserted
    steps: int = 0  # environment steps in it, reset steps excluded
    redelivered: bool = False  # it was delivered more than once
    kept_at: int = 0  # when the queue took it, µs since the epoch: sequences may begin anew; 0: not known


@dataclass
class Accounts(MessageAccounts[Outcome]):
    """Replay's counts since the run began. They never run backwards, also where the table does."""

    inserted: int = 0  # messages
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    rolled_back: int = 0  # of the inserted ones, those that crashes lost, as they came after the snapshot
    inserted_items: int = 0  # sequences
    sampled_items: int = 0
    # In the restored table, yet still queued: counted when they come. Not in the journal: `restore` says.
    restored: set[int] = field(default_factory=set)

    OTHER_DIRECTORY: ClassVar[str] = "a replay with another run directory; give that one, or another --run-id"
    OUTCOME: ClassVar[type[Any]] = Outcome
    NUMBERS: ClassVar[tuple[str, ...]] = (
        *MessageAccounts.NUMBERS,
        *("inserted", "rolled_back", "inserted_items", "sampled_items"),
    )

    @property
    def consumed(self) -> int:
        """Messages inserted."""
        return self.inserted

    def in_doubt_with(self, mark: dict[str, Any] | None) -> set[int]:
        """`in_doubt`, and what a snapshot adds that is newer than the journal."""
        return self.in_doubt.union(mark["pending"] if mark is not None else ())

    def mark(self) -> dict[str, Any]:
        """What a snapshot of the table remembers of the counts that belong to it."""
        pending = [sequence for sequence, outcome in self.pending.items() if outcome.reason is None]
        effective = self.inserted - self.rolled_back + len(self.restored)
        return {"effective": effective, "pending": [*pending, *sorted(self.restored)]}

    def restore(self, mark: dict[str, Any] | None, *, still_queued: Collection[int]) -> None:
        """The table now is that of a snapshot with this mark (None: it is empty); what came after is lost.

        After `resolve`: of what the snapshot holds, messages still queued will be counted when they come.
        """
        effective = 0
        if mark is not None:
            self.restored = set(mark["pending"]) & set(still_queued)
            effective = int(mark["effective"]) - len(self.restored)
        self.inserted = max(self.inserted, effective)  # less only where the journal is lost
        self.rolled_back = self.inserted - effective

    def _add(self, outcome: Outcome, sign: int) -> None:
        super()._add(outcome, sign)
        if outcome.reason is None:
            self.inserted += sign
        self.restored.discard(outcome.sequence)


def load_accounts(directory: Path) -> Accounts | None:
    """The accounts that lie in `directory`; None where there are none. Raises RunError when unreadable."""
    return read_accounts(directory, Accounts.from_json)
