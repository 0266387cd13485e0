"""The learner of an R2D2 run with a real nats-server, and a replay in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.learner import sampling
from services.learner.accounts import load_accounts, summary
from services.learner.config import LearnerConfig
from services.learner.learner import Learner
from services.learner.report import Report
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.control import request_control
from shared.bus.key_values import create_spec
from shared.bus.streams import ensure_run
from shared.bus.weights import WeightsReader
from shared.bus.work_queue import QueueState, ensure_queue
from shared.checkpoints import latest_checkpoint
from shared.errors import ConfigurationError, Refused
from shared.run_spec import own_spec
from shared.telemetry import Progress
from tests.support.learner_chunks import make_spec
from tests.support.learner_runs import learner_config
from tests.support.learner_runs import learning as learner_service
from tests.support.memory_replay import MemoryReplay, memory_replay
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

BATCH = 4
SETTINGS: dict[str, Any] = {
    "agent": "r2d2",
    "batch_size": BATCH,
    "burn_in": 2,
    "sequence_length": 8,
    "optimizer": "adam",
    "target_update_period": 1000,
    "grace_seconds": 4.0,
}
CHUNKS = 3  # of 4 steps: 2 of burn-in, 8 trained


def r2d2_config(nats: NatsRun, run_dir: Path, **settings: Any) -> LearnerConfig:
    return learner_config(nats, run_dir, **{**SETTINGS, **settings})


@asynccontextmanager
async def replay_of(bus: Bus, config: LearnerConfig) -> AsyncIterator[MemoryReplay]:
    """What the other services of the run do for its learner."""
    spec = await create_spec(bus, own_spec(config, make_spec().environment))
    await ensure_queue(bus, 100)
    await ensure_run(bus)
    async with memory_replay(bus, spec, chunks=CHUNKS) as replay:
        yield replay


@asynccontextmanager
async def learning(config: LearnerConfig, replay: MemoryReplay) -> AsyncIterator[Learner]:
    """A learner beside the block; it saves and ends with it. `ended` waits for its own end."""
    async with connected_bus(config, run_id=config.run_id, name="learner", patient=True) as bus:
        report = Report(nats=bus.address, is_connected=lambda: bus.is_connected, agent="r2d2")
        learner = Learner(config, bus, report, Progress(), owner="test", replay=replay)
        learner.report = report  # type: ignore[attr-defined]
        learner.done = asyncio.Event()  # type: ignore[attr-defined]

        async def run() -> None:
            await learner.run()
            learner.done.set()  # type: ignore[attr-defined]

        async with beside(run()):
            yield learner
            learner.end("stopped")
            await ended(learner)


async def ended(learner: Any, timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        await learner.done.wait()


async def test_priorities_come_back_for_every_sequence_that_was_trained(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay):
            await replay.insert(8)
            await eventually(lambda: load_accounts(tmp_path).updates >= 4)
        accounts = load_accounts(tmp_path)
        assert accounts.sequences == accounts.updates * BATCH
        assert all(0 <= priority != 1.0 for priority in replay.priorities.values())


async def test_steps_and_messages_are_those_that_replay_counts(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay) as learner:
            await replay.insert(5)
            await eventually(lambda: load_accounts(tmp_path).steps == replay.steps == 5 * CHUNKS * 4)
            status = learner.report.status()  # type: ignore[attr-defined]
            assert status["samples_per_insert"] > 0
        chunks = summary(load_accounts(tmp_path), QueueState(0, 0))["chunks"]
        assert (chunks["trained"], chunks["refused"], chunks["redelivered"]) == (5 * CHUNKS, 1, 2)


async def test_training_ends_with_the_steps_that_were_inserted(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path, total_steps=6 * CHUNKS * 4)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay) as learner:
            await replay.insert(5)
            await eventually(lambda: load_accounts(tmp_path).updates >= 2)
            assert learner.report.exit_reason is None  # type: ignore[attr-defined]
            await replay.insert(1)
            await ended(learner)
            assert learner.report.exit_reason == "total steps reached"  # type: ignore[attr-defined]
        weights = await WeightsReader(bus).newer_than(0)
        assert weights is not None
        assert weights.update == load_accounts(tmp_path).updates


async def test_replay_writes_a_snapshot_with_every_checkpoint_but_the_first(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay) as learner:
            await eventually(lambda: latest_checkpoint(tmp_path / "checkpoints"))
            assert replay.snapshots == []  # there may be no replay yet
            await replay.insert(4)
            await eventually(lambda: load_accounts(tmp_path).updates >= 1)
            said = await learner.save()
            assert said.endswith(f"; replay's snapshot {replay.snapshots[0]} holds 4 sequences")
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert replay.snapshots[-1] == f"update-{checkpoint.counters['updates']}"


async def test_a_checkpoint_is_saved_also_while_replay_is_away(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path, grace_seconds=1.0)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay):
            await replay.insert(4)
            await eventually(lambda: load_accounts(tmp_path).updates >= 1)
            replay.may_snapshot.clear()
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == load_accounts(tmp_path).updates > 0


async def test_a_wait_for_replays_snapshot_holds_up_no_other_checkpoint_and_not_the_end(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path, checkpoint_seconds=0.01)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        replay.may_snapshot.clear()
        async with learning(config, replay) as learner:
            await replay.insert(4)
            await eventually(lambda: replay.snapshots_asked)  # the one that comes from time to time waits
            updates = load_accounts(tmp_path).updates
            await eventually(lambda: load_accounts(tmp_path).updates > updates)
            learner.end("stopped")
            await ended(learner, timeout=config.grace_seconds)
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == load_accounts(tmp_path).updates > updates
        assert replay.snapshots_asked[-1] == f"update-{checkpoint.counters['updates']}"


async def test_a_replay_that_takes_no_priorities_holds_up_training_and_not_its_end(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        replay.may_update.clear()
        async with learning(config, replay) as learner:
            await replay.insert(4)
            await eventually(lambda: load_accounts(tmp_path).updates == sampling._UNANSWERED_UPDATES)
            report = learner.report  # type: ignore[attr-defined]
            await eventually(lambda: report.status()["waiting"] == ["sequences from replay"])
            assert report.training_since is None  # else the wait would count as training
            learner.end("stopped")
            await ended(learner, timeout=config.grace_seconds)
        assert load_accounts(tmp_path).updates == sampling._UNANSWERED_UPDATES


async def test_without_nats_and_replay_a_learner_saves_and_ends_within_its_grace(
    own_nats: OwnNats, tmp_path: Path
) -> None:
    config = r2d2_config(own_nats.run, tmp_path)
    async with own_nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay) as learner:
            await replay.insert(4)
            await eventually(lambda: load_accounts(tmp_path).updates >= 1)
            for may in (replay.may_update, replay.may_snapshot):
                may.clear()
            await own_nats.kill()
            learner.end("stopped")
            await ended(learner, timeout=config.grace_seconds)
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == load_accounts(tmp_path).updates > 0


async def test_control_stops_a_learner_without_waiting_for_replay(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus:
        await create_spec(bus, own_spec(config, make_spec().environment))
        await ensure_run(bus)
        async with learner_service(config) as learner:
            await eventually(lambda: latest_checkpoint(tmp_path / "checkpoints"))
            await eventually(lambda: says_it_waits_for_replay(bus))
            (stopped,) = await request_control(bus, "stop", timeout=10)
            assert stopped["done"] == "stops; saved checkpoint-000000000000 at update 0"
            await learner.ended(timeout=config.grace_seconds)


async def says_it_waits_for_replay(bus: Bus) -> bool:
    statuses = await request_control(bus, "status", timeout=10)
    return any(each["status"]["waiting"] == ["the first sequences from replay"] for each in statuses)


async def test_a_replay_that_cannot_write_its_snapshot_does_not_end_the_learner(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        replay.refusal = Refused("replay: cannot write snapshot: No space left on device")
        async with learning(config, replay) as learner:
            await replay.insert(4)
            await eventually(lambda: load_accounts(tmp_path).updates >= 1)
            assert (await learner.save()).endswith(f"; replay wrote no snapshot ({replay.refusal})")


async def test_a_learner_that_waits_for_replay_says_so_and_ends_when_told(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        replay.may_sample.clear()
        async with learning(config, replay) as learner:
            report = learner.report  # type: ignore[attr-defined]
            await eventually(lambda: report.waiting() == ["the first sequences from replay"])
            replay.may_sample.set()
            await replay.insert(4)
            await eventually(lambda: not report.waiting())
            replay.may_sample.clear()
            await eventually(lambda: report.status()["waiting"] == ["sequences from replay"])


async def test_a_restarted_learner_goes_on_with_its_target_network_and_counts(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay):
            await replay.insert(6)
            await eventually(lambda: load_accounts(tmp_path).updates >= 4)
            await eventually(lambda: load_accounts(tmp_path).steps == replay.steps)
        before = load_accounts(tmp_path)
        saved = latest_checkpoint(tmp_path / "checkpoints")
        assert saved is not None
        target = saved.optimizer["target_network"]
        assert target.keys() == saved.weights.keys()
        assert any(not tensor.equal(saved.weights[name]) for name, tensor in target.items())
        replay.may_sample.clear()
        resumed = config.model_copy(update={"resume": True})
        async with learning(resumed, replay) as learner:
            await eventually(lambda: learner.is_training)
            trainer = learner._session.trainer  # type: ignore[union-attr]
            assert trainer.updates == before.updates
            for name, tensor in trainer.target_network.state_dict().items():
                assert tensor.cpu().equal(target[name])
            replay.may_sample.set()
            await eventually(lambda: load_accounts(tmp_path).updates > before.updates)
        after = load_accounts(tmp_path)
        assert after.sequences == after.updates * BATCH
        assert after.steps == before.steps == replay.steps


async def test_sequences_of_another_run_end_the_learner_in_words(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        replay._chunks = 2
        await replay.insert(4)

        async def learn() -> None:
            async with learning(config, replay) as learner:
                await ended(learner)

        with pytest.raises(ConfigurationError, match="not this run's: replay's sequence has 2 chunks, not 3"):
            await learn()


async def test_the_lag_of_a_sequence_is_that_of_its_oldest_weights(nats: NatsRun, tmp_path: Path) -> None:
    config = r2d2_config(nats, tmp_path)
    async with nats.bus() as bus, replay_of(bus, config) as replay:
        async with learning(config, replay):
            await replay.insert(4, update=0)
            await eventually(lambda: load_accounts(tmp_path).updates >= 6)
        accounts = load_accounts(tmp_path)
        # Of lags from 100 up two digits are kept.
        assert accounts.lag_at(1.0) == pytest.approx(accounts.updates - 1, rel=0.05, abs=0)
        assert accounts.lags.total() == accounts.sequences
        assert np.isfinite(accounts.lag_at(0.5))  # type: ignore[arg-type]
