"""What the learner says of itself: /status, /readyz, and the points of the learning curves."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.learner.accounts import Accounts, summary
from services.learner.bottleneck import bottleneck
from services.learner.processor import Processor
from services.learner.r2d2 import R2D2Metrics
from services.learner.rates import Rates, Sample
from services.learner.replay_counts import ReplayCounts
from services.learner.training import UpdateMetrics
from shared.activity import Activity
from shared.bus.statuses import StatusBoard
from shared.bus.work_queue import QueueState

# TensorBoard's names, and the fields of both agents' metrics.
_CURVES = {
    "loss/total": "total_loss",
    "loss/policy": "policy_loss",
    "loss/baseline": "baseline_loss",
    "loss/entropy": "entropy_loss",
    "training/reward": "reward",
    "training/entropy": "entropy",
    "training/value": "value",
    "training/q_value": "q_value",
    "training/td_error": "td_error",
    "training/target": "target",
    "training/priority": "priority",
    "training/importance_weight": "rho",
    "training/sequence_weight": "importance_weight",
    "training/gradient_norm": "gradient_norm",
    "training/learning_rate": "learning_rate",
}


@dataclass
class Report:
    """The newest figures, gathered by the service; everything else is derived from them."""

    nats: str  # where the server is
    is_connected: Callable[[], bool] = lambda: False  # to NATS
    journal_trouble: Callable[[], str] = lambda: ""  # why it cannot be written
    weights_trouble: Callable[[], str] = lambda: ""  # why NATS does not take them
    awaited: list[str] = field(default_factory=list)  # before training can begin
    has_chunks: bool = False  # a trajectory has come since the start
    starved_seconds: float = 0.0  # for how long the next batch has been waited for
    accounts: Accounts = field(default_factory=Accounts)
    journaled: Callable[[], tuple[int, int]] | None = None  # steps and updates that no crash takes back
    queue: QueueState = field(default_factory=lambda: QueueState(0, 0))
    held: Callable[[], int] = lambda: 0  # messages in hand
    agent: str = "vtrace"
    update: UpdateMetrics | R2D2Metrics | None = None  # the newest since the start
    replay: ReplayCounts | None = None  # R2D2: what replay said last
    replay_snapshot: str | None = None  # R2D2: the newest that goes with a checkpoint
    weights_version: int = 0
    checkpoint: str | None = None  # the newest
    checkpoint_failures: int = 0  # checkpoints that could not be written, since the start
    exit_reason: str | None = None
    training_seconds: float = 0.0  # of finished updates
    training_since: float | None = None  # monotonic, of the update that is going on
    waiting_seconds: float = 0.0  # for batches that came
    waiting_since: float | None = None  # monotonic, for the one that is to come
    counting_seconds: float = 0.0  # until what was trained may be counted and published
    board: StatusBoard = field(default_factory=StatusBoard)  # what the other services say
    processor: Processor = field(default_factory=Processor)
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        self.activity = Activity("learner", self._working_seconds, lambda: self.counting_seconds)

    def _working_seconds(self) -> float:
        return self.training_seconds + _going_on(self.training_since, time.monotonic())

    def waited(self, *, until: float) -> None:
        """The wait for a batch that was going on has ended, at `until` (monotonic)."""
        self.waiting_seconds += _going_on(self.waiting_since, until)
        self.waiting_since = None

    @property
    def steps(self) -> int:
        """Environment steps in all messages done with, as the journal knows."""
        return self.journaled()[0] if self.journaled is not None else self.accounts.steps

    @property
    def updates(self) -> int:
        """Updates done, as the journal knows."""
        return self.journaled()[1] if self.journaled is not None else self.accounts.updates

    def sample(self, now: float) -> None:
        """Takes the totals of `now` (monotonic) for the speeds."""
        accounts = self.accounts
        training = self.training_seconds + _going_on(self.training_since, now)
        waiting = self.waiting_seconds + _going_on(self.waiting_since, now)
        self.activity.sample()
        self.processor.sample()
        self.rates.add(Sample(now, accounts.steps, accounts.updates, training, waiting))

    def waiting(self) -> list[str]:
        """What must come before training begins, in words; empty when it has begun."""
        nats = [f"NATS at {self.nats}"]
        if self.is_connected():
            nats = [f"NATS to take weights ({trouble})"] if (trouble := self.weights_trouble()) else []
        journal = [f"its journal ({trouble})"] if (trouble := self.journal_trouble()) else []
        return [*nats, *self.awaited, *journal]

    def status(self) -> dict[str, Any]:
        """The learner's /status."""
        food = "sequences from replay" if self.agent == "r2d2" else "trajectories"
        starving = [food] if self.starved_seconds > 2.0 and not self.waiting() else []
        names = (R2D2Metrics if self.agent == "r2d2" else UpdateMetrics)._fields
        update = self.update._asdict() if self.update else dict.fromkeys(names)
        return {
            **summary(self.accounts, self.queue),
            "steps": self.steps,
            "updates": self.updates,
            "seconds": round(self.accounts.seconds, 3),
            **self.rates.per_second(),
            "waiting": self.waiting() + starving,
            "activity": self.activity.shares(),
            "bottleneck": self._bottleneck(),
            "loss": update["total_loss"],
            **update,
            "messages_held": self.held(),
            "weights_version": self.weights_version,
            "checkpoint": self.checkpoint,
            "checkpoint_failures": self.checkpoint_failures,
            **(self._of_replay() if self.agent == "r2d2" else {}),
            "exit_reason": self.exit_reason,
        }

    def _bottleneck(self) -> str:
        me = {"waiting": self.waiting(), "activity": self.activity.shares()}
        replays = self.board.live("replay") if self.agent == "r2d2" else None
        return bottleneck(me, self.board.live("inference"), replays, self.processor.busy)

    def _of_replay(self) -> dict[str, Any]:
        inserted = self.replay.inserted_items if self.replay else 0
        return {
            "samples_per_insert": self.accounts.sequences / inserted if inserted else None,
            "replay_items": self.replay.items if self.replay else None,
            "replay_snapshot": self.replay_snapshot,
        }

    def curves(self) -> dict[str, float | None]:
        """A point of each learning curve, by TensorBoard's names."""
        accounts, rates, update = self.accounts, self.rates.per_second(), self.update
        points: dict[str, float | None] = {
            "episodes/mean_return_100": accounts.mean_return_100,
            "policy_lag/p50": accounts.lag_at(0.5),
            "policy_lag/p99": accounts.lag_at(0.99),
            "speed/steps_per_second": rates["steps_per_second"],
            "speed/updates_per_second": rates["updates_per_second"],
            "speed/waiting_share": rates["waiting_share"],
        }
        known = update._asdict() if update is not None else {}
        return points | {curve: known[field] for curve, field in _CURVES.items() if field in known}


def _going_on(since: float | None, now: float) -> float:
    """For how long, in seconds; 0 for what does not go on."""
    return 0.0 if since is None else max(0.0, now - since)
