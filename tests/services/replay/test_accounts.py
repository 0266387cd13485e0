"""The counts add up wherever between journal and acknowledgement replay died."""

from typing import NamedTuple

import pytest

from services.replay.accounts import Accounts, Outcome
from shared.errors import RunError


class Queue(NamedTuple):
    last_sequence: int
    messages: int


def counted(*sequences: int) -> Accounts:
    accounts = Accounts()
    accounts.count(Outcome(sequence, None, 10) for sequence in sequences)
    return accounts


def test_a_message_still_queued_after_a_crash_is_counted_when_it_comes_back() -> None:
    accounts = counted(1, 2, 3)
    accounts.confirm([1])
    accounts.resolve(still_queued=[3])
    assert (accounts.inserted, accounts.steps, accounts.pending) == (2, 20, {})
    accounts.count([Outcome(3, None, 10, redelivered=True)])
    assert (accounts.inserted, accounts.redelivered, accounts.steps) == (3, 1, 30)


def test_what_came_after_the_snapshot_is_rolled_back_and_stays_counted() -> None:
    accounts = counted(1, 2)
    mark = accounts.mark()
    accounts.count([Outcome(3, None, 10), Outcome(4, "spec", 10)])
    accounts.confirm([1, 2, 3, 4])
    accounts.resolve(still_queued=[])
    accounts.restore(mark, still_queued=[])
    assert (accounts.inserted, accounts.rolled_back, accounts.accounted) == (3, 1, 4)


def test_what_the_snapshot_holds_and_the_queue_sends_again_is_lost_once_only() -> None:
    accounts = counted(1, 2)
    mark = accounts.mark()  # 2 is in the snapshot, and not acknowledged
    accounts.confirm([1])
    accounts.resolve(still_queued=[2])
    accounts.restore(mark, still_queued=[2])
    assert (accounts.inserted, accounts.rolled_back) == (1, 0)


def test_without_a_snapshot_all_is_rolled_back() -> None:
    accounts = counted(1, 2)
    accounts.confirm([1, 2])
    accounts.restore(None, still_queued=[])
    assert (accounts.inserted, accounts.rolled_back) == (2, 2)


def test_messages_that_left_the_queue_uncounted_are_refused_as_lost() -> None:
    accounts = counted(1, 2)
    accounts.confirm([1, 2])
    accounts.settle_queue(Queue(last_sequence=5, messages=1), known=True)
    assert accounts.refused["lost"] == 2
    assert accounts.accounted + 1 == 5


def test_a_directory_that_was_not_this_runs_is_not_used() -> None:
    with pytest.raises(RunError):
        Accounts().settle_queue(Queue(last_sequence=5, messages=1), known=False)
