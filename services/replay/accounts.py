"""What became of every message of the work queue, exactly, also over a crash at any moment; knows no NATS.

published (the queue's last sequence) = inserted + refused + queued. To keep that true, a message is counted
in the journal **before** it is acknowledged, with its sequence among the `pending` ones. If replay dies
between the two, the message is still queued: at the restart it is taken out of the counts again (`resolve`)
and counted when it comes back. The journal is replaced atomically.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import orjson

from shared.errors import RunError

ACCOUNTS_FILE = "accounts.json"
ACCOUNTS_FORMAT_VERSION = 1

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


class QueueNumbers(Protocol):
    """What the work queue says of itself."""

    @property
    def last_sequence(self) -> int:
        """Messages ever published."""

    @property
    def messages(self) -> int:
        """Messages not acknowledged yet."""


@dataclass
class Accounts:
    """Replay's counts since the run began. They never run backwards, also where the table does."""

    steps: int = 0  # environment steps in all messages inserted and refused
    inserted: int = 0  # messages
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    redelivered: int = 0  # of the inserted and refused ones, how many were delivered more than once
    rolled_back: int = 0  # of the inserted ones, those that crashes lost, as they came after the snapshot
    inserted_items: int = 0  # sequences
    sampled_items: int = 0
    earlier_queues: int = 0  # messages published to queues that no longer exist
    pending: dict[int, Outcome] = field(default_factory=dict)  # counted, perhaps not acknowledged
    # In the restored table, yet still queued: counted when they come. Not in the journal: `restore` says.
    returning: set[int] = field(default_factory=set)

    @property
    def accounted(self) -> int:
        """Messages inserted and refused."""
        return self.inserted + sum(self.refused.values())

    def count(self, outcomes: Iterable[Outcome]) -> None:
        """Counts messages that are about to be acknowledged."""
        for outcome in outcomes:
            self._add(outcome, 1)
            self.pending[outcome.sequence] = outcome
            self.returning.discard(outcome.sequence)

    def confirm(self, sequences: Iterable[int]) -> None:
        """These were acknowledged: they never come back."""
        for sequence in sequences:
            self.pending.pop(sequence, None)

    def in_doubt(self, mark: dict[str, Any] | None) -> set[int]:
        """Messages of which only the queue knows whether they were acknowledged before the crash.

        A snapshot may be newer than the journal: its mark then has pending messages that are new to this.
        """
        return {*self.pending, *(mark["pending"] if mark is not None else ())}

    def resolve(self, still_queued: Iterable[int]) -> None:
        """After a crash: of the pending messages, these were not acknowledged and the others were.

        They are taken out of the counts, since they will be delivered and counted again.
        """
        for sequence in self.pending.keys() & set(still_queued):
            self._add(self.pending.pop(sequence), -1)
        self.pending.clear()

    def mark(self) -> dict[str, Any]:
        """What a snapshot of the table remembers of the counts that belong to it."""
        pending = [sequence for sequence, outcome in self.pending.items() if outcome.reason is None]
        effective = self.inserted - self.rolled_back + len(self.returning)
        return {"effective": effective, "pending": [*pending, *sorted(self.returning)]}

    def restore(self, mark: dict[str, Any] | None, *, still_queued: Collection[int]) -> None:
        """The table now is that of a snapshot with this mark (None: it is empty); what came after is lost.

        After `resolve`: of what the snapshot holds, messages still queued will be counted when they come.
        """
        effective = 0
        if mark is not None:
            self.returning = set(mark["pending"]) & set(still_queued)
            effective = int(mark["effective"]) - len(self.returning)
        self.rolled_back = max(0, self.inserted - effective)

    def settle_queue(self, queue: QueueNumbers, *, known: bool) -> None:
        """Compares the counts with the queue's at the start, when nothing is on its way.

        A queue younger than the run is taken for what it is. Messages that left the queue without being
        counted here (the machine crashed before the journal reached its disk, or somebody purged the queue)
        count as refused: lost. In a run directory that is not `known` to this run they mean that another
        one was used before: raises RunError.
        """
        missing = self.earlier_queues + queue.last_sequence - queue.messages - self.accounted
        if missing > 0 and not known:
            raise RunError(
                f"{missing} chunks of this run were consumed by a replay with another run directory; "
                f"give that one, or another --run-id"
            )
        if missing > 0:
            self.refused["lost"] += missing
        else:
            self.earlier_queues -= missing

    def _add(self, outcome: Outcome, sign: int) -> None:
        if outcome.reason is None:
            self.inserted += sign
        else:
            self.refused[outcome.reason] += sign
        self.steps += sign * outcome.steps
        self.redelivered += sign * outcome.redelivered

    def to_json(self) -> bytes:
        """The journal's content."""
        return orjson.dumps(
            {
                "format_version": ACCOUNTS_FORMAT_VERSION,
                **{name: getattr(self, name) for name in _PLAIN},
                "refused": self.refused,
                "pending": [list(outcome) for outcome in self.pending.values()],
            }
        )

    @staticmethod
    def from_json(data: bytes) -> "Accounts":
        """Raises ValueError when `data` is no journal of this format version."""
        try:
            raw: dict[str, Any] = orjson.loads(data)
            if raw["format_version"] != ACCOUNTS_FORMAT_VERSION:
                raise ValueError(
                    f"format version {raw['format_version']}, this program writes {ACCOUNTS_FORMAT_VERSION}"
                )
            accounts = Accounts(**{name: raw[name] for name in _PLAIN})
            accounts.refused.update(raw["refused"])
            accounts.pending.update({fields[0]: Outcome(*fields) for fields in raw["pending"]})
            return accounts
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{error!r}") from error


_PLAIN = (
    "steps",
    "inserted",
    "redelivered",
    "rolled_back",
    "inserted_items",
    "sampled_items",
    "earlier_queues",
)


def load_accounts(directory: Path) -> Accounts | None:
    """The accounts that lie in `directory`; None where there are none. Raises RunError when unreadable."""
    path = directory / ACCOUNTS_FILE
    try:
        return Accounts.from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the accounts {path}: {error}") from error


def write_accounts(directory: Path, data: bytes, *, durable: bool = False) -> None:
    """Replaces the journal in `directory` by `data` in one step.

    It then survives the end of this process; `durable` makes it survive the machine's, at the cost of
    waiting for the disk. Raises RunError when it cannot be written.
    """
    path = directory / ACCOUNTS_FILE
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            file.write(data)
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write the accounts {path}: {error.strerror}") from error
