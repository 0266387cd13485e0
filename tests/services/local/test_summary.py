"""summary.json: what it says and from where."""

from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from structlog.testing import capture_logs

from services.learner.accounts import Accounts
from services.learner.replay_counts import ReplayCounts
from services.learner.rows import Outcome
from services.local.config import TrainConfig
from services.local.directory import configured
from services.local.summary import (
    discarded_before,
    forget_discarded,
    frame_skip,
    replay_at_last,
    untrained_queue,
    write_summary,
)
from services.replay.accounts import Accounts as ReplayAccounts
from services.replay.accounts import Outcome as ReplayOutcome
from shared.accounts import write_accounts
from shared.bus.work_queue import QueueConsumer, QueueState, ensure_queue, publish_chunk
from tests.support.nats import NatsRun
from tests.support.queue import fetch_all


def config(directory: Path, env: str = "CartPole-v1", **settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"env": env, "run_dir": directory, **settings})


def test_speed_is_that_of_training_and_not_of_starting_and_ending(tmp_path: Path) -> None:
    write_accounts(tmp_path, Accounts(steps=6000, seconds=2.0, trained=40).to_json())
    written = write_summary(
        config(tmp_path), queue=QueueState(43, 3), discarded_steps=7, exit_reason="interrupted"
    )
    assert orjson.loads((tmp_path / "summary.json").read_bytes()) == written
    assert (written["seconds"], written["steps_per_second"]) == (2.0, 3000.0)
    assert (written["frames"], written["discarded_steps"]) == (6000, 7)
    assert written["exit_reason"] == "interrupted"
    chunks = written["chunks"]
    assert (chunks["published"], chunks["trained"], chunks["queued"]) == (43, 40, 3)


def test_what_was_published_to_a_queue_that_was_lost_counts(tmp_path: Path) -> None:
    write_accounts(tmp_path, Accounts(trained=40).to_json())
    written = write_summary(config(tmp_path), queue=QueueState(13, 3), discarded_steps=0, exit_reason="x")
    assert (written["chunks"]["published"], written["chunks"]["queued"]) == (43, 3)


def test_the_chunks_of_an_r2d2_run_are_those_that_replay_inserted(tmp_path: Path) -> None:
    write_accounts(
        tmp_path, Accounts(steps=500, replay_steps=500, seconds=2.0, trained=3, sequences=90).to_json()
    )
    replay = ReplayCounts(
        steps=600, inserted=40, refused={"spec": 2}, redelivered=1, items=20, inserted_items=30
    )
    written = write_summary(
        config(tmp_path, agent="r2d2"),
        queue=QueueState(43, 1),
        replay=replay,
        discarded_steps=0,
        exit_reason="total steps reached",
    )
    chunks = written["chunks"]
    assert (chunks["published"], chunks["trained"], chunks["refused"], chunks["queued"]) == (43, 40, 2, 1)
    assert (written["steps"], written["sequences"], written["samples_per_insert"]) == (600, 90, 3.0)
    assert written["eval_return"] is None


async def test_what_replay_took_is_in_its_journal_to_the_last_message(tmp_path: Path, nats: NatsRun) -> None:
    write_accounts(tmp_path, Accounts().to_json())
    replay = ReplayAccounts(inserted=2, steps=20, inserted_items=5)
    replay.pending[2] = ReplayOutcome(2, None, 10)
    (tmp_path / "replay").mkdir()
    write_accounts(tmp_path / "replay", replay.to_json())
    run = config(tmp_path, agent="r2d2")
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for number in range(3):
            await publish_chunk(bus, b"chunk", f"m/{number}")
        first, *_ = await fetch_all(QueueConsumer(bus), 3)
        await first.ack()
        queue = await untrained_queue(bus, run)
    assert queue == QueueState(last_sequence=3, messages=1)
    written = write_summary(
        run, queue=queue, replay=replay_at_last(run), discarded_steps=0, exit_reason="interrupted"
    )
    assert written["steps"] == 20
    assert {name: written["chunks"][name] for name in ("published", "trained", "queued")} == {
        "published": 3,
        "trained": 2,
        "queued": 1,
    }


async def test_what_was_trained_but_not_acknowledged_is_not_queued(tmp_path: Path, nats: NatsRun) -> None:
    accounts = Accounts(trained=2)
    accounts.pending.update({1: Outcome(1, None), 2: Outcome(2, None)})
    write_accounts(tmp_path, accounts.to_json())
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for number in range(3):
            await publish_chunk(bus, b"chunk", f"m/{number}")
        first, *_ = await fetch_all(QueueConsumer(bus), 3)
        await first.ack()  # of the two that are pending, this one got through
        assert await untrained_queue(bus, config(tmp_path)) == QueueState(last_sequence=3, messages=1)


def test_a_run_that_trained_nothing_has_a_summary(tmp_path: Path) -> None:
    written = write_summary(config(tmp_path), queue=None, discarded_steps=0, exit_reason="failed: actor: no")
    assert (written["steps"], written["steps_per_second"]) == (0, 0.0)
    assert written["chunks"]["published"] is None
    assert written["chunks"]["queued"] is None


def test_discarded_steps_of_earlier_parts_count_in_a_resumed_run_only(tmp_path: Path) -> None:
    resumed = config(tmp_path, resume=True)
    write_summary(resumed, queue=None, discarded_steps=7, exit_reason="interrupted")
    assert discarded_before(resumed) == 7
    assert discarded_before(config(tmp_path)) == 0


def test_what_a_killed_part_of_a_run_discarded_stays_unknown(tmp_path: Path) -> None:
    resumed = config(tmp_path, resume=True)
    assert discarded_before(resumed) is None
    write_summary(resumed, queue=None, discarded_steps=7, exit_reason="interrupted")
    with suppress(KeyboardInterrupt), configured(resumed):
        write_accounts(tmp_path, Accounts(steps=10).to_json())
        raise KeyboardInterrupt
    assert discarded_before(resumed) is None


def test_discarded_steps_that_nobody_told_of_stay_unknown(tmp_path: Path) -> None:
    resumed = config(tmp_path, resume=True)
    written = write_summary(resumed, queue=None, discarded_steps=None, exit_reason="interrupted")
    assert written["discarded_steps"] is None
    assert discarded_before(resumed) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"discarded_steps": "many"}'])
def test_what_a_damaged_summary_said_is_not_known_and_keeps_no_run_from_going_on(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(content)
    resumed = config(tmp_path, resume=True)
    with capture_logs() as logs:
        assert discarded_before(resumed) is None
    assert "summary.json is damaged: " in logs[0]["reason"]
    forget_discarded(resumed)


def test_emulator_frames_are_told_from_steps() -> None:
    assert frame_skip("CartPole-v1", {}) == 1
    assert frame_skip("my_package:MyEnv-v0", {"frameskip": 8}) == 1  # who knows what it means there
    assert frame_skip("ALE/Pong-v5", {}) == frame_skip("ale_py:ALE/Pong-v5", {}) == 4
    assert frame_skip("ALE/Pong-v5", {"frameskip": 2}) == 2
    assert frame_skip("ALE/Pong-v5", {"frameskip": [2, 5]}) is None


@pytest.mark.parametrize(("frameskip", "frames"), [(3, 30), ([2, 5], None)])
def test_the_frames_of_steps_of_random_length_are_not_known(
    frameskip: object, frames: int | None, tmp_path: Path
) -> None:
    write_accounts(tmp_path, Accounts(steps=10).to_json())
    of = config(tmp_path, "ALE/Pong-v5", env_kwargs={"frameskip": frameskip}, vectorization="sync")
    written = write_summary(of, queue=None, discarded_steps=0, exit_reason="stopped")
    assert written["frames"] == frames
