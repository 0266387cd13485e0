"""What replay says of itself, and what the learner makes of that."""

from services.learner.accounts import Accounts as LearnerAccounts
from services.learner.replay_counts import replay_counts
from services.replay.accounts import Accounts, Outcome
from services.replay.gate import Gate
from services.replay.report import Report
from tests.support.replay_shelves import shelf_of

STEPS = 640


def counted(accounts: Accounts, numbers: range) -> Accounts:
    accounts.count(Outcome(number, None, STEPS) for number in numbers)
    return accounts


def test_who_waits_for_the_lease_says_nothing_of_messages() -> None:
    waiting = Report(nats="", accounts=counted(Accounts(), range(1, 5)))
    assert replay_counts(waiting.status()) is None


def test_steps_that_come_again_after_a_crash_are_counted_once() -> None:
    learner = LearnerAccounts()

    def heard(report: Report) -> int:
        counts = replay_counts(report.status())
        assert counts is not None
        learner.mirror(counts)
        return learner.steps

    gate = Gate(shelf_of())
    accounts = counted(Accounts(), range(1, 85))
    accounts.confirm(range(1, 85))
    journal = counted(accounts, range(85, 95)).steps
    counted(accounts, range(95, 101))  # which the journal does not know
    assert heard(Report(nats="", gate=gate, accounts=accounts, journaled_steps=lambda: journal)) == journal
    accounts = counted(Accounts(), range(1, 95))
    accounts.confirm(range(1, 85))
    after = Report(
        nats="",
        gate=gate,
        accounts=accounts,
        journaled_steps=lambda: accounts.steps,
    )
    accounts.resolve(still_queued=range(85, 95))
    assert heard(after) == 94 * STEPS
    accounts = Accounts.from_json(accounts.to_json())  # killed again before they came
    accounts.resolve(still_queued=range(85, 95))
    assert heard(after) == 94 * STEPS
    counted(accounts, range(85, 103))
    assert heard(after) == 102 * STEPS
