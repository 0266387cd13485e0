"""What became of every message of the work queue, exactly, also over a crash at any moment; knows no NATS.

published (the queue's last sequence) = consumed + refused + queued. To keep that true, a message is counted
in the journal **before** it is acknowledged, with its sequence among the `pending` ones. If its consumer dies
between the two, the message is still queued: at the restart it is taken out of the counts again (`resolve`)
and counted when it comes back. Its steps stay counted, so that they never run backwards. The journal is
replaced atomically.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import orjson

from shared.errors import RunError
from shared.files import replace_file

ACCOUNTS_FILE = "accounts.json"
ACCOUNTS_FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # 1 has no `returning`, and its pending messages no `kept_at`


class MessageOutcome(Protocol):
    """What became of one message of the work queue; a NamedTuple that begins with its sequence."""

    def __iter__(self) -> Iterator[Any]:
        """Its values, as they stand in the journal."""

    @property
    def sequence(self) -> int:
        """Its sequence in the queue."""

    @property
    def reason(self) -> str | None:
        """Why it was refused; None: it was not."""

    @property
    def steps(self) -> int:
        """Environment steps in it, reset steps excluded."""

    @property
    def redelivered(self) -> bool:
        """Whether it was delivered more than once."""

    @property
    def kept_at(self) -> int:
        """When the queue took it, in µs since the epoch; 0: not known."""


class QueueNumbers(Protocol):
    """What the work queue says of itself."""

    @property
    def last_sequence(self) -> int:
        """Messages ever published."""

    @property
    def messages(self) -> int:
        """Messages not acknowledged yet."""


Outcome = TypeVar("Outcome", bound=MessageOutcome)
T = TypeVar("T")


@dataclass
class MessageAccounts(Generic[Outcome]):
    """The counts of messages that whoever takes them from the queue keeps since the run began."""

    steps: int = 0  # environment steps in all messages consumed and refused
    refused: dict[str, int] = field(default_factory=dict)  # messages by reason
    redelivered: int = 0  # of the consumed and refused ones, how many were delivered more than once
    earlier_queues: int = 0  # messages published to queues that no longer exist
    pending: dict[int, Outcome] = field(default_factory=dict)  # counted, perhaps not acknowledged
    # Messages that come again, of which only the steps are counted: `kept_at` by sequence.
    returning: dict[int, int] = field(default_factory=dict)

    OTHER_DIRECTORY: ClassVar[str] = "with another run directory"  # who consumed, and what to do
    OUTCOME: ClassVar[type[Any]]  # of which `pending` is
    NUMBERS: ClassVar[tuple[str, ...]] = ("steps", "redelivered", "earlier_queues")  # fields in the journal
    LATER: ClassVar[frozenset[str]] = frozenset()  # of them, those that its first versions did not have

    @property
    def consumed(self) -> int:
        """Messages counted that were not refused."""
        raise NotImplementedError

    @property
    def accounted(self) -> int:
        """Messages consumed and refused."""
        return self.consumed + sum(self.refused.values())

    @property
    def in_doubt(self) -> set[int]:
        """Messages of which only the queue knows, after a crash, whether they were acknowledged."""
        return self.returning.keys() | self.pending.keys()

    def is_returning(self, sequence: int, kept_at: int) -> bool:
        """Whether the steps of this message, kept at `kept_at`, were counted before a crash."""
        return self.returning.get(sequence) in (0, kept_at)

    def published(self, queue: QueueNumbers) -> int:
        """Messages ever published, as far as `queue`, which may be another than before, is known."""
        return max(self.earlier_queues + queue.last_sequence, self.accounted)

    def count(self, outcomes: Iterable[Outcome]) -> None:
        """Counts messages that are about to be acknowledged."""
        for outcome in outcomes:
            self._add(outcome, 1)
            if not self.is_returning(outcome.sequence, outcome.kept_at):
                self.steps += outcome.steps
            self.returning.pop(outcome.sequence, None)
            self.pending[outcome.sequence] = outcome

    def confirm(self, sequences: Iterable[int]) -> None:
        """These were acknowledged: they never come back."""
        for sequence in sequences:
            self.pending.pop(sequence, None)

    def resolve(self, still_queued: Iterable[int]) -> None:
        """After a crash: of the messages in doubt, these were not acknowledged and the others were.

        They are taken out of the counts but for their steps, since they will be delivered and counted again.
        """
        queued = set(still_queued)
        for sequence in self.pending.keys() & queued:
            outcome = self.pending.pop(sequence)
            self._add(outcome, -1)
            self.returning[sequence] = outcome.kept_at
        for sequence in self.returning.keys() - queued:
            del self.returning[sequence]
        self.pending.clear()

    def settle_queue(self, queue: QueueNumbers, *, known: bool) -> None:
        """Compares the counts with the queue's at the start, when nothing is on its way.

        A queue younger than the run is taken for what it is. Messages that left the queue without being
        counted here (the machine crashed before the journal reached its disk, or somebody purged the queue)
        count as refused: lost. In a run directory that is not `known` to this run they mean that another
        one was used before: raises RunError.
        """
        self.recognize_queue(queue)
        missing = self._missing(queue)
        if missing > 0 and not known:
            raise RunError(f"{missing} chunks of this run were consumed by {self.OTHER_DIRECTORY}")
        if missing > 0:
            self.refused["lost"] += missing

    def recognize_queue(self, queue: QueueNumbers) -> None:
        """Where more is accounted for than was published to `queue`, the rest was to queues before it.

        For a moment at which nothing is on its way.
        """
        self.earlier_queues += max(0, -self._missing(queue))

    def _missing(self, queue: QueueNumbers) -> int:
        return self.earlier_queues + queue.last_sequence - queue.messages - self.accounted

    def to_json(self) -> bytes:
        """The journal's content."""
        return orjson.dumps(
            {
                "format_version": ACCOUNTS_FORMAT_VERSION,
                **{name: getattr(self, name) for name in self.NUMBERS},
                "refused": self.refused,
                "pending": [list(outcome) for outcome in self.pending.values()],
                "returning": sorted(self.returning.items()),
                **self._more(),
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError when `data` is no journal of this format version."""
        try:
            raw = orjson.loads(data)
            if not isinstance(raw, dict):
                raise ValueError("no JSON object")
            if raw["format_version"] not in _READ_VERSIONS:
                raise ValueError(
                    f"format version {raw['format_version']}, this program writes {ACCOUNTS_FORMAT_VERSION}"
                )
            accounts = cls()
            for name in cls.NUMBERS:
                if name in raw or name not in cls.LATER:
                    kind = type(getattr(accounts, name))
                    setattr(accounts, name, counted(name, raw[name], whole=kind is int))
            for reason, messages in typed("refused", raw["refused"], dict).items():
                accounts.refused[reason] = counted(reason, messages)
            for fields in typed("pending", raw["pending"], list):
                outcome = cls.OUTCOME(*typed("a pending message", fields, list))
                _check_outcome(outcome._asdict(), accounts.refused)
                accounts.pending[outcome.sequence] = outcome
            for sequence, kept_at in typed("returning", raw.get("returning", []), list):
                accounts.returning[counted("a returning message", sequence)] = counted("its time", kept_at)
            accounts._take_more(raw)
            return accounts
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{error!r}") from error

    def _more(self) -> dict[str, Any]:
        """What else the journal holds."""
        return {}

    def _take_more(self, raw: dict[str, Any]) -> None:
        """The inverse of `_more`."""

    def _add(self, outcome: Outcome, sign: int) -> None:
        """Into the counts but the steps (1), or out of them again (−1)."""
        if outcome.reason is not None:
            self.refused[outcome.reason] += sign
        self.redelivered += sign * outcome.redelivered


def counted(name: str, value: Any, *, whole: bool = True) -> Any:
    """`value`, a number from 0 up; raises ValueError when it is something else."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value < 0:
        raise ValueError(f"{name} is {value!r}, not a number from 0 up")
    return value


def typed(name: str, value: Any, kind: type[T]) -> T:
    """`value`; raises ValueError when it is not of this kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r}, of another type than {kind.__name__}")
    return value


def _check_outcome(values: dict[str, Any], reasons: Collection[str]) -> None:
    reason = values.pop("reason")
    if not (reason is None or reason in reasons):
        raise ValueError(f"a pending message was refused for {reason!r}")
    for name, value in values.items():
        typed(name, value, int)
    counted("sequence", values["sequence"])
    counted("steps", values["steps"])


def read_accounts(directory: Path, parse: Callable[[bytes], T]) -> T | None:
    """The journal in `directory`; None where there is none. Raises RunError when it cannot be read."""
    path = directory / ACCOUNTS_FILE
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the accounts {path}: {error}") from error


def write_accounts(directory: Path, data: bytes, *, durable: bool = False) -> None:
    """Replaces the journal in `directory` by `data` in one step.

    `durable`: it then survives the end of the machine as well. Raises RunError when it cannot be written.
    """
    path = directory / ACCOUNTS_FILE
    try:
        replace_file(path, data, durable=durable)
    except OSError as error:
        raise RunError(f"cannot write the accounts {path}: {error.strerror}") from error
