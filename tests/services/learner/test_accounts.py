"""The accounts must add up after a crash at any moment: every moment is tried."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from services.learner.accounts import CHECKPOINTS, Accounts, completed, has_begun, load_accounts, summary
from services.learner.replay_counts import ReplayCounts
from services.learner.rows import Outcome
from shared.accounts import ACCOUNTS_FILE, write_accounts
from shared.bus.work_queue import QueueState
from shared.errors import RunError

STEPS = 10  # of every message


@dataclass
class FakeQueue:
    """A work queue: messages stay until they are acknowledged."""

    last_sequence: int = 0
    queued: dict[int, bool] = field(default_factory=dict)  # sequence -> delivered before

    @property
    def messages(self) -> int:
        return len(self.queued)

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.last_sequence += 1
            self.queued[self.last_sequence] = False

    def deliver(self, sequence: int) -> bool:
        """Whether it was delivered before."""
        before, self.queued[sequence] = self.queued[sequence], True
        return before


def learn(queue: FakeQueue, run_dir: Path, batch: int = 3) -> Iterator[str]:
    """A learner that yields at every point where it could be killed."""
    accounts = load_accounts(run_dir)
    yield "loaded"
    accounts.resolve(accounts.in_doubt & queue.queued.keys())
    accounts.settle_queue(queue, known=True)
    write_accounts(run_dir, accounts.to_json())
    yield "restored"
    while queue.queued:
        sequences = list(queue.queued)[:batch]
        outcomes = []
        for index, sequence in enumerate(sequences):
            again = queue.deliver(sequence)
            reason = "lag" if index == 2 else None
            outcomes.append(Outcome(sequence, reason, steps=STEPS, lag=index, redelivered=again))
            yield "delivered"
        accounts.updates += 1
        yield "trained"
        accounts.count(outcomes)
        yield "counted"
        write_accounts(run_dir, accounts.to_json())
        yield "written"
        for sequence in sequences:
            del queue.queued[sequence]
            yield "acknowledged"
        accounts.confirm(sequences)
        yield "confirmed"
    write_accounts(run_dir, accounts.to_json())
    yield "done"


def check(queue: FakeQueue, run_dir: Path) -> Accounts:
    accounts = load_accounts(run_dir)
    assert not queue.queued
    assert accounts.pending == {}
    assert accounts.accounted == queue.last_sequence
    assert accounts.refused["lost"] == 0
    assert accounts.steps == STEPS * accounts.accounted
    assert accounts.lags.total() == accounts.trained
    return accounts


def test_the_accounts_add_up_after_a_crash_at_every_point(tmp_path: Path) -> None:
    length = len(list(learn(FakeQueue(7, dict.fromkeys(range(1, 8), False)), _fresh(tmp_path, "count"))))
    for crash in range(length):
        run_dir = _fresh(tmp_path, f"crash{crash}")
        queue = FakeQueue()
        queue.publish(7)
        learner = learn(queue, run_dir)
        point = [next(learner) for _ in range(crash + 1)][-1]
        in_doubt = list(queue.queued.values()).count(True)
        learner.close()
        queue.publish(2)
        for _ in learn(queue, run_dir):
            pass
        accounts = check(queue, run_dir)
        assert accounts.redelivered == in_doubt, point


def test_the_accounts_add_up_after_many_crashes_at_random_points(tmp_path: Path) -> None:
    for seed in range(200):
        chance = random.Random(seed)
        run_dir, queue = _fresh(tmp_path, f"run{seed}"), FakeQueue()
        for _ in range(6):
            queue.publish(chance.randrange(6))
            learner = learn(queue, run_dir, batch=chance.randrange(1, 5))
            for _ in range(chance.randrange(40)):
                next(learner, None)
            learner.close()
        for _ in learn(queue, run_dir):
            pass
        check(queue, run_dir)


def test_a_queue_that_was_made_anew_continues_the_run(tmp_path: Path) -> None:
    accounts = Accounts(trained=40, refused={"lag": 2})
    queue = FakeQueue()
    queue.publish(3)
    accounts.settle_queue(queue, known=True)
    assert summary(accounts, queue)["chunks"]["published"] == 45
    accounts.settle_queue(queue, known=True)
    assert summary(accounts, queue)["chunks"]["published"] == 45


def test_messages_that_another_run_directory_consumed_are_named() -> None:
    queue = FakeQueue(last_sequence=9, queued={9: False})
    with pytest.raises(RunError, match="8 chunks of this run were consumed by a learner with another"):
        Accounts().settle_queue(queue, known=False)


def test_messages_that_vanished_from_the_queue_count_as_refused_and_lost() -> None:
    accounts = Accounts(trained=5)
    accounts.settle_queue(FakeQueue(last_sequence=9, queued={9: False}), known=True)
    assert accounts.refused["lost"] == 3
    assert accounts.accounted == 8


def test_updates_after_the_checkpoint_are_rolled_back_once_however_often_the_learner_dies() -> None:
    accounts = Accounts(updates=100)
    accounts.restore(updates=90, effective_updates=90)
    assert (accounts.updates, accounts.rolled_back, accounts.effective_updates) == (100, 10, 90)
    accounts.restore(updates=90, effective_updates=90)
    assert (accounts.updates, accounts.rolled_back) == (100, 10)
    accounts.updates += 5
    accounts.restore(updates=90, effective_updates=90)
    assert (accounts.updates, accounts.rolled_back) == (105, 15)
    accounts.updates += 5
    accounts.restore(updates=108, effective_updates=93)
    assert (accounts.updates, accounts.rolled_back) == (110, 17)


def test_a_checkpoint_ahead_of_the_journal_loses_nothing() -> None:
    accounts = Accounts(updates=100, rolled_back=4)
    accounts.restore(updates=101, effective_updates=97)
    assert (accounts.updates, accounts.rolled_back) == (101, 4)


def test_a_journal_older_than_the_checkpoint_does_not_count_steps_of_replay_twice() -> None:
    replay = ReplayCounts(steps=2100, inserted=21, refused={}, redelivered=0, items=5, inserted_items=5)
    for known in (0, 1000, 2000):
        accounts = Accounts(steps=known, replay_steps=known)
        accounts.restore(updates=10, effective_updates=10, steps=2000)
        accounts.mirror(replay)
        assert accounts.steps == 2100


def test_an_unacknowledged_message_leaves_the_counts_but_its_steps_as_if_it_had_never_come() -> None:
    accounts = Accounts()
    accounts.count([Outcome(4, None, steps=3, redelivered=True), Outcome(5, "lag", steps=2)])
    assert (accounts.redelivered, accounts.trained, accounts.steps) == (1, 1, 5)
    accounts.resolve(still_queued=[4, 5])
    assert accounts.to_json() == Accounts(steps=5, returning={4: 0, 5: 0}).to_json()


def test_the_steps_of_messages_that_come_again_are_counted_once_however_often_a_learner_starts() -> None:
    accounts = Accounts()
    accounts.count([Outcome(4, None, steps=3), Outcome(5, "lag", steps=2)])
    for _ in range(3):  # killed each time before anything came
        accounts = Accounts.from_json(accounts.to_json())
        accounts.resolve(accounts.in_doubt & {4, 5, 6})
        accounts.restore(updates=1, effective_updates=1, steps=5)
        assert (accounts.steps, accounts.trained) == (5, 0)
    accounts.count([Outcome(4, None, steps=3), Outcome(5, None, steps=2), Outcome(6, None, steps=1)])
    assert (accounts.steps, accounts.trained) == (6, 3)
    assert not accounts.returning


def kept(sequences: Iterable[int], *, at: int) -> list[Outcome]:
    return [Outcome(sequence, None, steps=2, kept_at=at + sequence) for sequence in sequences]


@pytest.mark.parametrize("acknowledged", [0, 3])
def test_messages_of_a_queue_that_is_gone_do_not_come_again(acknowledged: int) -> None:
    accounts = Accounts()
    accounts.count(kept(range(1, 6), at=1000))
    accounts.confirm(range(1, acknowledged + 1))
    accounts.resolve(still_queued=accounts.in_doubt & set(range(1, 8)))
    accounts.settle_queue(QueueState(7, 7), known=True)  # a new one, whose sequences begin anew
    accounts.count(kept(range(1, 8), at=2000))
    assert accounts.steps == 5 * 2 + 7 * 2


def test_messages_of_a_queue_that_came_after_one_that_is_gone_come_again() -> None:
    accounts = Accounts()
    accounts.count(kept(range(1, 6), at=1000))
    accounts.confirm(range(1, 6))
    accounts.count(kept([1, 2, 3], at=2000))  # of the new one
    accounts.confirm([1])
    accounts = Accounts.from_json(accounts.to_json())
    accounts.resolve(still_queued=[2, 3])
    accounts.settle_queue(QueueState(4, 3), known=True)
    accounts.count(kept([2, 3, 4], at=2000))
    assert (accounts.steps, accounts.trained) == (9 * 2, 9)


def test_a_journal_of_the_first_version_is_read() -> None:
    accounts = Accounts()
    accounts.count([Outcome(4, None, steps=3)])
    raw = orjson.loads(accounts.to_json())
    del raw["returning"]
    raw |= {"format_version": 1, "pending": [fields[:-1] for fields in raw["pending"]]}
    accounts = Accounts.from_json(orjson.dumps(raw))
    accounts.resolve(still_queued=[4])
    accounts.count([Outcome(4, None, steps=3, kept_at=1000)])
    assert (accounts.steps, accounts.trained) == (3, 1)


def test_what_ended_a_training_can_be_told_from_its_accounts() -> None:
    limits = {"total_steps": 100, "max_seconds": 30.0}
    assert completed(Accounts(steps=100, seconds=40.0), **limits) == "total steps reached"  # type: ignore[arg-type]
    assert completed(Accounts(steps=99, seconds=30.0), **limits) == "time limit reached"  # type: ignore[arg-type]
    assert completed(Accounts(steps=99, seconds=29.0), **limits) is None  # type: ignore[arg-type]
    assert completed(Accounts(steps=99, seconds=1e9), total_steps=100, max_seconds=0.0) is None


def test_the_lag_quantiles_are_those_of_the_trained_messages() -> None:
    accounts = Accounts()
    assert accounts.lag_at(0.5) is None
    accounts.count(Outcome(i, None, lag=lag) for i, lag in enumerate([0] * 50 + [1] * 48 + [7, 9]))
    accounts.count([Outcome(1000, "lag", lag=500)])
    assert [accounts.lag_at(q) for q in (0.5, 0.51, 0.98, 0.99, 1.0)] == [0, 1, 1, 7, 9]


def test_the_summary_tells_the_quantiles_of_the_lag_apart() -> None:
    accounts = Accounts()
    accounts.count(Outcome(i, None, lag=lag) for i, lag in enumerate([0] * 50 + [1] * 48 + [7, 9]))
    assert summary(accounts, FakeQueue())["policy_lag"] == {"p50": 0, "p99": 7, "max": 9}


def test_a_withdrawn_message_leaves_no_lag_behind() -> None:
    accounts = Accounts()
    accounts.count([Outcome(1, None, lag=3), Outcome(2, None, lag=9)])
    accounts.resolve(still_queued=[2])
    assert accounts.lag_at(1.0) == 3
    assert accounts.pending == {}


def test_the_mean_return_is_of_the_last_hundred_episodes() -> None:
    accounts = Accounts()
    assert accounts.mean_return_100 is None
    accounts.count_episodes([1000.0] * 50)
    accounts.count_episodes([2.0] * 99 + [4.0])
    assert accounts.mean_return_100 == pytest.approx(2.02)
    assert accounts.episodes == 150


def test_the_journal_holds_everything(tmp_path: Path) -> None:
    accounts = Accounts(updates=3, seconds=1.5, rolled_back=1, earlier_queues=2)
    accounts.count([Outcome(1, None, 5, 2, True), Outcome(2, "spec", 7), Outcome(3, "undecodable")])
    accounts.count_episodes([1.0, -2.5])
    write_accounts(tmp_path, accounts.to_json(), durable=True)
    assert load_accounts(tmp_path) == accounts


def test_a_run_without_a_journal_has_empty_accounts(tmp_path: Path) -> None:
    assert load_accounts(tmp_path) == Accounts()


@pytest.mark.parametrize("name", [ACCOUNTS_FILE, f"{CHECKPOINTS}/checkpoint-000000000001"])
def test_a_directory_with_a_journal_or_a_checkpoint_holds_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / "notes.txt").touch()
    assert not has_begun(tmp_path)
    (tmp_path / name).touch()
    assert has_begun(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format_version": 99}', b"\xff\x00"])
def test_a_damaged_journal_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ACCOUNTS_FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"cannot read the accounts .*accounts\.json"):
        load_accounts(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": "many"}, "steps is 'many', not a number from 0 up"),
        ({"trained": -5}, "trained is -5, not"),
        ({"updates": 1.5}, "updates is 1.5, not"),
        ({"episodes": None}, "episodes is None, not"),
        ({"redelivered": True}, "redelivered is True, not"),
        ({"seconds": "long"}, "seconds is 'long', not"),
        ({"refused": []}, "refused is [], of another type than dict"),
        ({"refused": {"lag": "x"}}, "lag is 'x', not"),
        ({"pending": {}}, "pending is {}, of another type than list"),
        ({"pending": [7]}, "a pending message is 7, of another type than list"),
        ({"pending": [["7", None]]}, "sequence is '7', of another type than int"),
        ({"pending": [[7, "whim"]]}, "a pending message was refused for 'whim'"),
        ({"pending": [[7, None, -1]]}, "steps is -1, not"),
        ({"returns": 1.0}, "returns is 1.0, of another type than list"),
        ({"returns": ["good"]}, "a return is 'good', not a number"),
        ({"lags": {"0": 1}}, "lags is {'0': 1}, of another type than list"),
        ({"lags": [[0, "x"]]}, "a lag's messages is 'x', not"),
        ({"lags": [7]}, "cannot unpack"),
    ],
)
def test_a_journal_with_other_values_than_counts_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    (tmp_path / ACCOUNTS_FILE).write_bytes(orjson.dumps(orjson.loads(Accounts().to_json()) | changed))
    with pytest.raises(RunError, match=rf"cannot read the accounts .*: .*{re.escape(said)}"):
        load_accounts(tmp_path)


def test_the_summary_has_its_names_and_adds_up() -> None:
    accounts, queue = Accounts(updates=2, rolled_back=1), FakeQueue()
    accounts.count([Outcome(1, None, 5, 2, True), Outcome(2, "spec", 7)])
    queue.publish(3)
    queue.queued = {3: False}
    assert summary(accounts, queue) == {
        "steps": 12,
        "updates": 2,
        "episodes": 0,
        "mean_return_100": None,
        "policy_lag": {"p50": 2, "p99": 2, "max": 2},
        "chunks": {
            "published": 3,
            "trained": 1,
            "refused": 1,
            "refused_by_reason": {"lag": 0, "spec": 1, "undecodable": 0, "lost": 0},
            "queued": 1,
            "redelivered": 1,
            "rolled_back": 1,
        },
    }


def _fresh(tmp_path: Path, name: str) -> Path:
    directory = tmp_path / name
    directory.mkdir()
    return directory


# R2D2


def test_the_lags_of_sequences_are_kept_to_two_digits() -> None:
    accounts = Accounts()
    accounts.count_sequences([0, 99, 100, 1234, 98765])
    assert dict(accounts.lags) == {0: 1, 99: 1, 100: 1, 1200: 1, 99000: 1}
    assert accounts.sequences == 5
    assert Accounts.from_json(accounts.to_json()).sequences == 5


def test_steps_never_run_backwards_when_replay_lost_some() -> None:
    accounts = Accounts()
    counts = ReplayCounts(steps=100, inserted=10, refused={}, redelivered=0, items=5, inserted_items=5)
    accounts.mirror(counts)
    accounts.mirror(counts._replace(steps=60, inserted=6))
    assert (accounts.steps, accounts.trained) == (100, 6)
    restored = Accounts.from_json(accounts.to_json())
    restored.mirror(counts._replace(steps=0, inserted=0))  # about to restore its snapshot
    restored.mirror(counts._replace(steps=75, inserted=8))
    assert (restored.steps, restored.trained) == (115, 8)


def test_messages_that_replay_was_given_more_than_once_are_told_as_its_own() -> None:
    accounts = Accounts()
    accounts.mirror(ReplayCounts(60, 6, refused={}, redelivered=2, items=5, inserted_items=5))
    assert summary(accounts, FakeQueue())["chunks"]["redelivered"] == 2


def test_what_replay_refused_counts_where_it_could_insert_nothing() -> None:
    accounts = Accounts()
    accounts.mirror(ReplayCounts(60, 0, {"too_large": 3}, redelivered=0, items=0, inserted_items=0))
    assert (accounts.steps, accounts.trained, accounts.refused["too_large"]) == (60, 0, 3)


def test_a_journal_from_before_there_were_sequences_is_read() -> None:
    raw = orjson.loads(Accounts(updates=3).to_json())
    del raw["sequences"], raw["replay_steps"]
    assert Accounts.from_json(orjson.dumps(raw)).updates == 3
