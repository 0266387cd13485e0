"""What replay says of itself: /status and /readyz."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time
from typing import Any

from services.replay.accounts import Accounts
from services.replay.gate import Gate
from shared.activity import Activity
from shared.bus.work_queue import QueueState


@dataclass
class Report:
    """The newest figures, gathered by the service; everything else is derived from them."""

    nats: str  # where the server is
    is_connected: Callable[[], bool] = lambda: False  # to NATS
    journal_trouble: Callable[[], str] = lambda: ""  # why it cannot be written
    awaited: list[str] = field(default_factory=list)  # before anything can be inserted
    gate: Gate | None = None  # once there is a spec
    accounts: Accounts = field(default_factory=Accounts)
    journaled_steps: Callable[[], int] = lambda: 0  # those that a crash takes nothing of
    queue: QueueState = field(default_factory=lambda: QueueState(0, 0))
    held: Callable[[], int] = lambda: 0  # messages in hand
    snapshot: dict[str, Any] | None = None  # the newest: name, items, bytes, seconds
    restored: str | None = None  # the snapshot that this process began with

    def __post_init__(self) -> None:
        self.activity = Activity("replay", process_time, lambda: self.blocked()["inserts"][1])

    @property
    def steps(self) -> int:
        """Environment steps inserted and refused, as the journal knows; never fewer than before a crash."""
        return self.journaled_steps()

    @property
    def ratio(self) -> float:
        """Sequences sampled per sequence inserted, since the run began."""
        inserted = self.accounts.inserted_items
        return self.accounts.sampled_items / inserted if inserted else 0.0

    def waiting(self) -> list[str]:
        """What must come before replay takes anything, in words; empty when it does."""
        nats = [] if self.is_connected() else [f"NATS at {self.nats}"]
        journal = [f"its journal ({trouble})"] if (trouble := self.journal_trouble()) else []
        return [*nats, *self.awaited, *journal]

    def blocked(self) -> dict[str, tuple[bool, float]]:
        """By side: whether it waits now, and for how many seconds it did so far."""
        if self.gate is None:
            return {"inserts": (False, 0.0), "samples": (False, 0.0)}
        sides = {"inserts": self.gate.inserts, "samples": self.gate.samples}
        return {side: (waits.is_blocked, waits.seconds) for side, waits in sides.items()}

    def table_status(self) -> dict[str, Any]:
        """What the table holds."""
        if self.gate is None:
            return {"items": 0, "bytes": 0, "rows": 0, "streams": 0, "balance": 0.0, "limiter": None}
        shelf = self.gate.shelf
        return {
            "items": shelf.table.size,
            "bytes": shelf.table.total_bytes,
            "rows": shelf.table.rows,
            "streams": shelf.table.streams,
            "balance": shelf.limiter.balance,
            "limiter": shelf.words(),
        }

    def status(self) -> dict[str, Any]:
        """Replay's /status. `limiter` says in words which side waits, and for what; else "free"."""
        return {
            "waiting": self.waiting(),
            "activity": self.activity.shares(),
            **self.table_status(),
            "steps": self.steps,
            "inserted_items": self.accounts.inserted_items,
            "sampled_items": self.accounts.sampled_items,
            "samples_per_insert": self.ratio,
            "blocked": {side: is_blocked for side, (is_blocked, _) in self.blocked().items()},
            "blocked_seconds": {side: round(seconds, 3) for side, (_, seconds) in self.blocked().items()},
            # Who waits for another replay's lease knows only what the journal said at its start.
            "chunks": self._chunks() if self.gate is not None else None,
            "messages_held": self.held(),
            "snapshot": self.snapshot,
            "restored": self.restored,
        }

    def _chunks(self) -> dict[str, Any]:
        accounts = self.accounts
        return {
            "published": accounts.published(self.queue),
            "inserted": accounts.inserted,
            "refused": sum(accounts.refused.values()),
            "refused_by_reason": dict(accounts.refused),
            "queued": self.queue.messages,
            "redelivered": accounts.redelivered,
            "rolled_back": accounts.rolled_back,
        }
