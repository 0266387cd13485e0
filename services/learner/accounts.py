"""The accounts of the learner: messages (`shared/accounts.py`), updates, episodes, policy lag."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from services.learner.replay_counts import ReplayCounts
from services.learner.rows import REASONS, Outcome
from shared.accounts import ACCOUNTS_FILE, MessageAccounts, QueueNumbers, counted, read_accounts, typed

CHECKPOINTS = "checkpoints"
RETURNS_KEPT = 100

STEPS_REACHED, TIME_REACHED = "total steps reached", "time limit reached"
COMPLETED = (STEPS_REACHED, TIME_REACHED)  # why a training ended that ran to its end


@dataclass
class Accounts(MessageAccounts[Outcome]):
    """The learner's counts since the run began. Messages are counted; `steps` are those in them."""

    updates: int = 0  # monotone over crashes
    seconds: float = 0.0  # since the first trajectory, without the time the learner was away
    trained: int = 0
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    rolled_back: int = 0  # updates that crashes lost, as they came after the checkpoint
    episodes: int = 0  # of training, to their end
    returns: deque[float] = field(default_factory=lambda: deque(maxlen=RETURNS_KEPT))  # the newest, raw
    lags: Counter[int] = field(default_factory=Counter)  # trained messages by policy lag in updates
    sequences: int = 0  # R2D2: sequences trained; one that was sampled twice counts twice
    replay_steps: int = 0  # R2D2: what replay said last of its steps

    OTHER_DIRECTORY: ClassVar[str] = (
        "a learner with another run directory; give that one with --resume, or another --run-id"
    )
    OUTCOME: ClassVar[type[Any]] = Outcome
    LATER: ClassVar[frozenset[str]] = frozenset({"sequences", "replay_steps"})
    NUMBERS: ClassVar[tuple[str, ...]] = (
        *MessageAccounts.NUMBERS,
        *("updates", "seconds", "trained", "rolled_back", "episodes", "sequences", "replay_steps"),
    )

    @property
    def consumed(self) -> int:
        """Messages trained."""
        return self.trained

    @property
    def effective_updates(self) -> int:
        """Updates that are in the weights: those done, less those that crashes lost."""
        return self.updates - self.rolled_back

    @property
    def mean_return_100(self) -> float | None:
        """Mean raw return of the last 100 training episodes; None before the first."""
        return sum(self.returns) / len(self.returns) if self.returns else None

    def count_sequences(self, lags: Iterable[int]) -> None:
        """R2D2: counts trained sequences by their lag, of which two digits are kept, as there are many."""
        for lag in lags:
            self.sequences += 1
            self.lags[lag if lag < 100 else int(float(f"{lag:.1e}"))] += 1

    def mirror(self, replay: ReplayCounts) -> None:
        """R2D2: the messages are replay's, and so is what became of them.

        `steps` grows by what was inserted since the last time. A replay that begins again from an older
        snapshot says fewer steps than before; those that it lost stay counted. One that has nothing says
        nothing: it may be about to restore what it had.
        """
        if not (replay.inserted or any(replay.refused.values())):
            return
        self.steps += max(0, replay.steps - self.replay_steps)
        self.replay_steps = replay.steps
        self.trained, self.redelivered = replay.inserted, replay.redelivered
        self.refused.update(replay.refused)

    def resolve(self, still_queued: Iterable[int]) -> None:
        """As the base's."""
        super().resolve(still_queued)
        self.lags = +self.lags  # without zeros

    def restore(self, *, updates: int, effective_updates: int, steps: int = 0) -> None:
        """The weights now are those of a checkpoint with these counters; what came after it is lost.

        A journal that knows of fewer steps is an older one: what replay said of the others is missing too.
        """
        unknown = max(0, steps - self.steps)
        self.steps += unknown
        self.replay_steps += unknown
        self.updates = max(self.updates, updates)
        self.rolled_back = self.updates - effective_updates

    def count_episodes(self, returns: Sequence[float]) -> None:
        """Counts finished training episodes, oldest first."""
        self.episodes += len(returns)
        self.returns.extend(returns)

    def lag_at(self, quantile: float) -> int | None:
        """The least policy lag that `quantile` of the trained messages do not exceed; None without any."""
        needed, seen = quantile * self.lags.total(), 0
        for lag in sorted(self.lags):
            seen += self.lags[lag]
            if seen >= needed and seen:
                return lag
        return None

    def _add(self, outcome: Outcome, sign: int) -> None:
        super()._add(outcome, sign)
        if outcome.reason is None:
            self.trained += sign
            self.lags[outcome.lag] += sign

    def _more(self) -> dict[str, Any]:
        return {"returns": list(self.returns), "lags": sorted(self.lags.items())}

    def _take_more(self, raw: dict[str, Any]) -> None:
        for value in typed("returns", raw["returns"], list):
            if not isinstance(value, int | float):
                raise ValueError(f"a return is {value!r}, not a number")
            self.returns.append(value)
        for lag, messages in typed("lags", raw["lags"], list):
            self.lags[typed("a lag", lag, int)] = counted("a lag's messages", messages)


def completed(accounts: Accounts, *, total_steps: int, max_seconds: float) -> str | None:
    """Why a training with these accounts and limits has run to its end; None: it has not."""
    if accounts.steps >= total_steps:
        return STEPS_REACHED
    return TIME_REACHED if 0 < max_seconds <= accounts.seconds else None


def has_begun(run_dir: Path) -> bool:
    """Whether `run_dir` holds a journal or a checkpoint."""
    return (run_dir / ACCOUNTS_FILE).exists() or any((run_dir / CHECKPOINTS).glob("checkpoint-*"))


def load_accounts(run_dir: Path) -> Accounts:
    """The accounts that lie in `run_dir`, or empty ones. Raises RunError when they cannot be read."""
    return read_accounts(run_dir, Accounts.from_json) or Accounts()


def summary(accounts: Accounts, queue: QueueNumbers) -> dict[str, Any]:
    """What accounts and queue say of a run, by the names of summary.json and /status."""
    return {
        "steps": accounts.steps,
        "updates": accounts.updates,
        "episodes": accounts.episodes,
        "mean_return_100": accounts.mean_return_100,
        **({"sequences": accounts.sequences} if accounts.sequences else {}),
        "policy_lag": {
            "p50": accounts.lag_at(0.5),
            "p99": accounts.lag_at(0.99),
            "max": accounts.lag_at(1.0),
        },
        "chunks": {
            "published": accounts.published(queue),
            "trained": accounts.trained,
            "refused": sum(accounts.refused.values()),
            "refused_by_reason": dict(accounts.refused),
            "queued": queue.messages,
            "redelivered": accounts.redelivered,
            "rolled_back": accounts.rolled_back,
        },
    }
