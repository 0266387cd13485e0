"""A learner that ends, is killed, or loses its NATS server: the accounts stay exact."""

import asyncio
import random
import shutil
import signal
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

import services.learner.learner as learner_module
from services.learner.accounts import has_begun, load_accounts
from shared import settling
from shared.accounts import ACCOUNTS_FILE, write_accounts
from shared.bus.key_values import wait_for_spec
from shared.bus.streams import run_bucket
from shared.bus.weights import watch_weights
from shared.bus.work_queue import QueueConsumer, QueueMessage, queue_state, still_queued
from shared.checkpoints import latest_checkpoint
from shared.errors import ConfigurationError, RunError
from tests.support.commands import command, environment
from tests.support.learner_runs import (
    BATCH_SIZE,
    SETTINGS,
    UNROLL,
    Queue,
    learner_config,
    learner_spec,
    learning,
)
from tests.support.nats import NatsRun, OwnNats
from tests.support.statuses import next_status
from tests.support.waiting import eventually


async def test_a_stopped_run_goes_on_where_it_was(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)):
            await queue.fed(7)
            await eventually(lambda: load_accounts(tmp_path).updates == 3)
        first = await queue.exact_accounts(tmp_path)
        assert (first.trained, first.updates) == (6, 3)
        async with learning(learner_config(nats, tmp_path, resume=True)):
            await queue.fed(3)
            await queue.emptied()
        second = await queue.exact_accounts(tmp_path)
        assert (second.trained, second.updates, second.rolled_back) == (10, 5, 0)
        assert second.redelivered == 1  # the first one had the seventh in hand, and gave it back
        assert second.steps == 10 * 2 * UNROLL


async def test_steps_are_counted_once_where_a_learner_that_could_not_acknowledge_is_followed_by_two(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "QueueConsumer", partial(QueueConsumer, ack_wait=0.5))

    async def unheard(message: QueueMessage) -> None:
        await asyncio.Event().wait()

    async def dies(*_: object) -> None:
        raise RuntimeError("killed as soon as it had begun")

    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        with monkeypatch.context() as patch:
            patch.setattr(QueueMessage, "ack", unheard)
            async with learning(learner_config(nats, tmp_path, grace_seconds=1.0)):
                await queue.fed(2)
                await eventually(lambda: load_accounts(tmp_path).updates == 1)
        steps = load_accounts(tmp_path).steps
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["steps"] == steps == 2 * 2 * UNROLL
        config = learner_config(nats, tmp_path, resume=True)
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(learner_module.Learner, "_live", dies)
                async with learning(config, fails=True) as learner:
                    await asyncio.wait([learner.task])
            assert "as soon as" in str(learner.task.exception())
            assert load_accounts(tmp_path).steps == steps
        async with learning(config):
            await queue.fed(2)
            await queue.emptied()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.steps, accounts.trained) == (2 * steps, 4)


async def test_a_run_that_is_complete_trains_nothing_more_when_it_is_resumed(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        await queue.fed(6)
        for resume in (False, True):
            config = learner_config(nats, tmp_path, total_steps=BATCH_SIZE * UNROLL, resume=resume)
            async with learning(config) as learner:
                await learner.ended()
        assert (await queue.exact_accounts(tmp_path)).updates == 1


async def test_resume_without_a_checkpoint_begins_with_fresh_weights(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)):
            await queue.fed(4)
            await queue.emptied()
        shutil.rmtree(tmp_path / "checkpoints")
        async with learning(learner_config(nats, tmp_path, resume=True)):
            await queue.fed(4)
            await queue.emptied()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.updates, accounts.rolled_back) == (4, 2)
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["effective_updates"] == 2


async def test_resume_with_damaged_checkpoints_alone_is_refused_and_changes_nothing(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)):
            await queue.fed(4)
            await queue.emptied()
        for path in (tmp_path / "checkpoints").rglob("manifest.json"):
            path.unlink()
        before = load_accounts(tmp_path)
        files = sorted((tmp_path / "checkpoints").rglob("*"))
        await queue.fed(2)
        async with learning(learner_config(nats, tmp_path, resume=True), fails=True) as learner:
            with pytest.raises(RunError, match=r"no checkpoint in .*checkpoints is whole: checkpoint-0+2: "):
                await learner.ended()
        assert sorted((tmp_path / "checkpoints").rglob("*")) == files
        assert (load_accounts(tmp_path).updates, load_accounts(tmp_path).rolled_back) == (before.updates, 0)


async def test_resume_in_an_empty_directory_begins_a_run(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path / "new", resume=True)):
            await queue.fed(2)
            await queue.emptied()
        assert (await queue.exact_accounts(tmp_path / "new")).updates == 1


class Crash(Exception):
    """Stands for the end of the process: nothing of the learner runs after it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, point: str, after: int) -> None:
    """Makes the learner end at `point` the `after`-th time it comes there."""
    write, ack, times = write_accounts, QueueMessage.ack, iter(range(1, 1_000_000))

    def crash() -> None:
        if next(times) == after:
            raise Crash

    def writes(run_dir: Path, data: bytes, *, durable: bool = False) -> None:
        if not durable and point == "before the journal":
            crash()
        write(run_dir, data, durable=durable)

    async def acknowledges(message: QueueMessage) -> None:
        if point == "before the acknowledgement":
            crash()
        await ack(message)
        if point == "after the acknowledgement":
            crash()

    monkeypatch.setattr(settling, "write_accounts", writes)
    monkeypatch.setattr(QueueMessage, "ack", acknowledges)


@pytest.mark.parametrize(
    "point", ["before the journal", "before the acknowledgement", "after the acknowledgement"]
)
@pytest.mark.parametrize("after", [1, 4])
async def test_the_accounts_are_exact_after_a_crash_around_an_acknowledgement(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, after: int
) -> None:
    monkeypatch.setattr(learner_module, "QueueConsumer", partial(QueueConsumer, ack_wait=0.5))
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        with monkeypatch.context() as patch:
            crash_at(patch, point, after)
            async with learning(learner_config(nats, tmp_path), fails=True) as learner:
                await queue.fed(10, rows=BATCH_SIZE)
                await asyncio.wait([learner.task])
            assert "Crash" in "".join(traceback.format_exception(learner.task.exception()))
        crashed = load_accounts(tmp_path)
        assert bool(crashed.pending) == (point != "before the journal" or after > 1)
        left = (await queue_state(bus)).messages
        async with learning(learner_config(nats, tmp_path, resume=True)):
            await queue.emptied()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.trained == 10
        assert accounts.steps == 10 * BATCH_SIZE * UNROLL
        assert accounts.redelivered >= (1 if point == "before the acknowledgement" else 0)
        assert accounts.updates == accounts.rolled_back + left
        assert accounts.pending == {}


async def test_the_steps_are_exact_after_a_crash_while_nothing_was_acknowledged(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a journal written then, but for the checkpoint, which knows of the updates meanwhile."""
    monkeypatch.setattr(learner_module, "QueueConsumer", partial(QueueConsumer, ack_wait=0.5))
    has_crashed = asyncio.Event()

    async def acknowledges(message: QueueMessage) -> None:
        await has_crashed.wait()
        raise Crash

    def saved_updates() -> int:
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        return int(checkpoint.counters["updates"]) if checkpoint is not None else 0

    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        with monkeypatch.context() as patch:
            patch.setattr(QueueMessage, "ack", acknowledges)
            config = learner_config(nats, tmp_path, checkpoint_seconds=0.1)
            async with learning(config, fails=True) as learner:
                await queue.fed(10, rows=BATCH_SIZE)
                await eventually(lambda: saved_updates() >= 4)
                has_crashed.set()
                await asyncio.wait([learner.task])
            assert "Crash" in "".join(traceback.format_exception(learner.task.exception()))
        async with learning(learner_config(nats, tmp_path, resume=True)):
            await queue.emptied()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.trained == 10
        assert accounts.steps == 10 * BATCH_SIZE * UNROLL


class KilledLearner:
    """A learner in a process of its own."""

    def __init__(self, nats: NatsRun, run_dir: Path) -> None:
        settings = {**SETTINGS, "run_id": nats.run_id, "nats_url": nats.url, "run_dir": run_dir}
        settings["hidden_sizes"] = "[8]"
        words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self._command = command("learner", *words, "--checkpoint-seconds=0.5", "--resume")
        self._environment = environment(SEEDRL_NATS_TOKEN=nats.token)
        self._log = run_dir / "learner.log"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """The process; killed at the end unless it has ended."""
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def test_the_successor_of_a_stopped_learner_waits_until_that_has_ended(
    nats: NatsRun, tmp_path: Path
) -> None:
    """Continued, that one writes accounts and a checkpoint once more."""
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with KilledLearner(nats, tmp_path).running() as process:
            await queue.fed(4)
            await eventually(lambda: has_begun(tmp_path) and load_accounts(tmp_path).updates == 2, 60.0)
            process.send_signal(signal.SIGSTOP)
            await bus.js.purge_stream(f"KV_{bus.subjects.leases_bucket}")  # as after its time to live
            await queue.fed(4)
            async with learning(learner_config(nats, tmp_path, resume=True)) as learner:

                async def waits() -> bool:
                    waiting = (await next_status(bus, "learner"))["waiting"]
                    return any(f"checkpoints, which process {process.pid} on " in words for words in waiting)

                await eventually(waits)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                await process.wait()
                await queue.emptied()
                await learner.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.trained, accounts.updates, accounts.rolled_back) == (8, 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
async def test_the_accounts_are_exact_after_kills_in_the_middle_of_training(
    nats: NatsRun, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    learner = KilledLearner(nats, tmp_path)
    async with nats.bus() as bus:
        queue = await Queue.created(bus, max_messages=7)
        feeding = asyncio.create_task(endless(queue, chance))
        updates = 0
        for _ in range(3):
            async with learner.running():
                wanted = updates + chance.randrange(20, 200)
                await eventually(lambda wanted=wanted: load_accounts(tmp_path).updates >= wanted, 60.0)
            updates = load_accounts(tmp_path).updates
        feeding.cancel()
        await asyncio.wait([feeding])
        async with learner.running() as process:
            # A rest of less than a batch may stay: a message that was half used is trained as a whole again.
            await eventually(lambda: queue.holds_at_most(BATCH_SIZE - 1), timeout=40.0)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, (tmp_path / "learner.log").read_text()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.pending == {}
        kept = await still_queued(bus, queue.rows)
        gone = [rows for sequence, rows in queue.rows.items() if sequence not in kept]
        assert accounts.trained == len(gone)
        assert accounts.steps == sum(gone) * UNROLL
        assert accounts.redelivered >= 1
        assert accounts.updates > updates
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == accounts.updates
        assert checkpoint.counters["effective_updates"] == accounts.updates - accounts.rolled_back


async def endless(queue: Queue, chance: random.Random) -> None:
    while True:
        await queue.fed(1, rows=chance.randrange(1, 5))


async def test_training_goes_on_when_the_server_was_killed_and_started_again(
    own_nats: OwnNats, tmp_path: Path
) -> None:
    async with own_nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(own_nats.run, tmp_path)) as learner:
            await queue.fed(5)
            await eventually(lambda: load_accounts(tmp_path).updates == 2)
            await own_nats.kill()
            await own_nats.start()
            await bus.connected()
            await eventually(lambda: sent(queue, 5), timeout=20.0)
            await queue.emptied()
            await learner.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.trained, accounts.updates) == (10, 5)


async def test_the_queue_hears_that_messages_in_hand_are_worked_on(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling.Settling.keep_alive, "__defaults__", (0.01,))
    in_progress, said = QueueMessage.in_progress, []

    async def noted(message: QueueMessage) -> None:
        said.append(message.sequence)
        await in_progress(message)

    monkeypatch.setattr(QueueMessage, "in_progress", noted)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        sequence = await queue.fed(1, rows=BATCH_SIZE - 1)  # no batch yet
        async with learning(learner_config(nats, tmp_path)):
            await eventually(lambda: sequence in said)


async def test_a_waiting_learner_gives_spec_and_weights_back_to_a_server_that_lost_its_store(
    own_nats: OwnNats, tmp_path: Path
) -> None:
    async with own_nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(own_nats.run, tmp_path)):
            await queue.fed(4)
            await eventually(lambda: load_accounts(tmp_path).updates == 2)
            await own_nats.lose_store()
            async with asyncio.timeout(20):
                assert await wait_for_spec(bus) == queue.spec
                async for weights in watch_weights(bus):
                    assert weights.update == 2
                    break


async def test_a_learner_ends_when_its_run_has_got_another_spec(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path), fails=True) as learner:
            await eventually(lambda: has_begun(tmp_path))
            await (await run_bucket(bus)).put("spec", learner_spec(unroll=9).to_json())
            with pytest.raises(ConfigurationError, match=r"anew with other settings.*unroll is 4, .* is 9"):
                await learner.ended()


async def sent(queue: Queue, count: int) -> bool:
    await queue.fed(count)
    return True


async def test_a_learner_without_its_server_saves_and_ends_within_its_grace(
    own_nats: OwnNats, tmp_path: Path
) -> None:
    async with own_nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(own_nats.run, tmp_path, grace_seconds=4.0)) as learner:
            await queue.fed(4)
            await queue.emptied()
            await own_nats.kill()
            await learner.stopped()
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == 2
        assert load_accounts(tmp_path).trained == 4
        assert (tmp_path / ACCOUNTS_FILE).exists()
