import copy
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from services.replay.accounts import Accounts, Outcome, Reason, load_accounts
from shared.accounts import ACCOUNTS_FILE, write_accounts
from shared.errors import RunError


class QueueState(NamedTuple):
    last_sequence: int
    messages: int


class Saved(NamedTuple):
    mark: dict[str, Any]
    table: frozenset[int]


class Replay:
    """Does what the service does with its accounts, one step at a time, and may be killed after any."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last_sequence = 0
        self.queued: dict[int, Outcome] = {}
        self.delivered: set[int] = set()  # ever
        self.saved: Saved | None = None
        self.start()

    def start(self) -> None:
        accounts = load_accounts(self.directory)
        is_known, self.accounts = accounts is not None, accounts or Accounts()
        mark, self.table = self.saved or (None, frozenset())
        still_queued = sorted(self.accounts.in_doubt_with(mark) & self.queued.keys())
        self.accounts.resolve(still_queued=still_queued)
        self.accounts.restore(mark, still_queued=still_queued)
        self.accounts.settle_queue(self.state(), known=is_known)
        self.taking: list[int] = []  # counted, not in the journal
        self.journaled: list[int] = []  # in the journal, not acknowledged
        self.acknowledged: list[int] = []  # acknowledged, not confirmed
        write_accounts(self.directory, self.accounts.to_json())

    def state(self) -> QueueState:
        return QueueState(self.last_sequence, len(self.queued))

    def publish(self, outcome: Outcome) -> None:
        self.last_sequence += 1
        self.queued[self.last_sequence] = outcome._replace(sequence=self.last_sequence)

    def count(self) -> None:
        """Takes the next message in hand and inserts or refuses it."""
        in_hand = {*self.taking, *self.journaled, *self.acknowledged}
        waiting = [sequence for sequence in self.queued if sequence not in in_hand]
        if waiting:
            outcome = self.queued[waiting[0]]._replace(redelivered=waiting[0] in self.delivered)
            self.delivered.add(waiting[0])
            if outcome.reason is None:
                self.table |= {outcome.sequence}
            self.accounts.count([outcome])
            self.taking.append(outcome.sequence)

    def journal(self) -> None:
        if not self.journaled and not self.acknowledged:
            self.journaled, self.taking = self.taking, []
            write_accounts(self.directory, self.accounts.to_json())

    def acknowledge(self) -> None:
        if self.journaled:
            self.acknowledged.append(self.journaled.pop(0))
            del self.queued[self.acknowledged[-1]]

    def confirm(self) -> None:
        if not self.journaled:
            self.accounts.confirm(self.acknowledged)
            self.acknowledged = []

    def save(self) -> None:
        self.saved = Saved(copy.deepcopy(self.accounts.mark()), self.table)

    def crash(self) -> None:
        self.start()
        self.check()
        assert self.accounts.pending == {}

    def check(self) -> None:
        """Whatever is in hand, the counts are those of what was taken out of the queue or is about to be."""
        accounts, in_hand = self.accounts, [*self.taking, *self.journaled]
        assert self.last_sequence == accounts.accounted + len(self.queued) - len(in_hand)
        assert accounts.refused["lost"] == accounts.earlier_queues == 0
        gone = [sequence for sequence in self.table if sequence not in self.queued or sequence in in_hand]
        assert accounts.inserted - accounts.rolled_back == len(gone)


# So that messages pile up in every place, and crashes come before and after snapshots.
WEIGHTS = {"publish": 6, "count": 6, "journal": 5, "acknowledge": 8, "confirm": 5, "save": 1, "crash": 1}
OUTCOMES: list[Reason | None] = [None, None, None, "spec", "too_large"]


@pytest.mark.parametrize("seed", range(10))
def test_wherever_it_is_killed_every_message_is_counted_once_and_what_was_lost_is_told(
    seed: int, tmp_path: Path
) -> None:
    turns = random.Random(seed)
    replay, published = Replay(tmp_path), list[Outcome]()
    for operation in turns.choices([*WEIGHTS], [*WEIGHTS.values()], k=2000):
        if operation == "publish":
            published.append(Outcome(0, turns.choice(OUTCOMES), turns.randrange(1000)))
            replay.publish(published[-1])
        else:
            getattr(replay, operation)()
        replay.check()
    replay.crash()
    while replay.queued or replay.acknowledged:
        for operation in ("count", "journal", "acknowledge", "confirm"):
            getattr(replay, operation)()
            replay.check()
    accounts = replay.accounts
    assert accounts.steps == sum(outcome.steps for outcome in published)
    reasons = Counter(outcome.reason for outcome in published)
    assert accounts.inserted == reasons.pop(None)
    assert +Counter(accounts.refused) == reasons
    assert 0 < accounts.rolled_back < accounts.inserted


def test_a_snapshot_newer_than_the_journal_does_not_hide_what_was_rolled_back() -> None:
    accounts = Accounts()
    accounts.count([Outcome(1, None), Outcome(2, None)])
    accounts.confirm([1, 2])
    accounts.restore(None, still_queued=[])
    assert accounts.rolled_back == 2
    journal = accounts.to_json()
    accounts.count([Outcome(3, None)])
    mark = accounts.mark()
    again = Accounts.from_json(journal)
    assert again.in_doubt_with(mark) == {3}
    again.resolve(still_queued=[3])
    again.restore(mark, still_queued=[3])
    assert (again.inserted, again.rolled_back) == (2, 2)


def test_a_snapshot_taken_before_a_message_came_back_still_counts_it_as_held() -> None:
    accounts = Accounts()
    accounts.count([Outcome(1, None)])
    mark = accounts.mark()
    accounts.resolve(still_queued=[1])
    accounts.restore(mark, still_queued=[1])
    early = accounts.mark()
    accounts.count([Outcome(1, None, redelivered=True)])
    accounts.confirm([1])
    accounts.restore(early, still_queued=[])
    assert (accounts.inserted, accounts.rolled_back, accounts.redelivered) == (1, 0, 1)


def test_messages_that_left_the_queue_unseen_are_lost_where_the_run_is_known() -> None:
    accounts = Accounts()
    accounts.count([Outcome(1, None), Outcome(2, "spec")])
    accounts.settle_queue(QueueState(10, 5), known=True)
    assert (accounts.refused["lost"], accounts.accounted) == (3, 5)
    accounts.settle_queue(QueueState(10, 5), known=True)
    assert accounts.refused["lost"] == 3


def test_a_directory_new_to_a_run_that_has_consumed_messages_is_refused() -> None:
    with pytest.raises(RunError, match="3 chunks of this run were consumed by a replay with another run"):
        Accounts().settle_queue(QueueState(8, 5), known=False)
    Accounts().settle_queue(QueueState(5, 5), known=False)


def test_a_queue_younger_than_the_run_begins_where_the_older_one_ended() -> None:
    accounts = Accounts()
    accounts.count([Outcome(number, None) for number in range(1, 8)])
    for last_sequence in (0, 4):
        accounts.settle_queue(QueueState(last_sequence, last_sequence), known=True)
        assert (accounts.earlier_queues, accounts.refused["lost"]) == (7, 0)
    accounts.count([Outcome(1, None)])
    accounts.settle_queue(QueueState(4, 3), known=True)
    assert (accounts.earlier_queues, accounts.refused["lost"]) == (7, 0)


def test_the_journal_holds_all_there_is(tmp_path: Path) -> None:
    assert load_accounts(tmp_path) is None
    accounts = Accounts(rolled_back=3, inserted_items=7, sampled_items=9, earlier_queues=2)
    accounts.count([Outcome(1, None, 20), Outcome(2, "too_large", 5, redelivered=True)])
    write_accounts(tmp_path, accounts.to_json(), durable=True)
    again = load_accounts(tmp_path)
    assert again == accounts
    assert (again.steps, again.inserted, again.redelivered, again.pending[2].reason) == (
        25,
        1,
        1,
        "too_large",
    )


_WRITER = """
import sys, pathlib
from services.replay.accounts import *
from shared.accounts import write_accounts
accounts = Accounts()
for sequence in range(1, 1_000_000):
    accounts.count([Outcome(sequence, None, 3)])
    write_accounts(pathlib.Path(sys.argv[1]), accounts.to_json())
    print(sequence, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_the_journal_before_or_after(tmp_path: Path) -> None:
    for kill_at in (1, 40, 150):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == kill_at:
                    process.kill()
                    break
        accounts = load_accounts(tmp_path)
        assert accounts is not None
        assert accounts.inserted >= kill_at
        assert accounts.steps == 3 * accounts.inserted == 3 * len(accounts.pending)


def test_a_journal_that_cannot_be_replaced_stays_and_the_error_says_which(tmp_path: Path) -> None:
    before = Accounts(inserted=4)
    write_accounts(tmp_path, before.to_json())
    (tmp_path / ACCOUNTS_FILE).with_suffix(".tmp").mkdir()
    with pytest.raises(RunError, match=rf"cannot write the accounts {tmp_path}.*[Dd]irectory"):
        write_accounts(tmp_path, Accounts(inserted=5).to_json())
    assert load_accounts(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"{}",
        lambda data: data.replace(b'"inserted":', b'"inverted":'),
        lambda data: data.replace(b'"format_version":2', b'"format_version":3'),
        lambda data: data.replace(b'"returning":[]', b'"returning":[7]'),
        lambda data: data.replace(b'"returning":[]', b'"returning":[[7,"x"]]'),
        lambda data: data.replace(b'"pending":[', b'"pending":[[],'),
        lambda data: data.replace(b'"inserted":2', b'"inserted":"x"'),
        lambda data: data.replace(b'"inserted":2', b'"inserted":-2'),
        lambda data: data.replace(b'"inserted":2', b'"inserted":true'),
        lambda data: data.replace(b'"steps":0', b'"steps":0.5'),
        lambda data: data.replace(b'"lost":0', b'"lost":"x"'),
        lambda data: data.replace(b'"pending":[[1', b'"pending":[["x"'),
        lambda data: data.replace(b'"pending":[[1,null', b'"pending":[[1,"whim"'),
        lambda data: data.replace(b'"pending":[[1,null,0', b'"pending":[[1,null,"many"'),
        lambda data: data.replace(b'"pending":[[1,null,0,false,0]', b'"pending":["1"'),
        lambda _: b"null",
    ],
)
def test_a_damaged_journal_is_no_empty_one(damage: Any, tmp_path: Path) -> None:
    accounts = Accounts()
    accounts.count([Outcome(1, None), Outcome(2, None)])
    data = accounts.to_json()
    (tmp_path / ACCOUNTS_FILE).write_bytes(damage(data))
    assert damage(data) != data
    with pytest.raises(RunError, match=f"cannot read the accounts {tmp_path}"):
        load_accounts(tmp_path)
