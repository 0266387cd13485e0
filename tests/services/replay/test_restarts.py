"""Replay that ends, is killed, or finds a damaged snapshot: what it holds and counts afterwards."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

import services.replay.replay as replay_module
from services.replay.accounts import Accounts, load_accounts
from shared.bus.connection import Bus
from shared.bus.replay import ReplayClient, ReplaySample
from shared.bus.work_queue import QueueMessage, queue_state
from shared.errors import RunError
from shared.wire.chunks import slice_rows
from tests.support.chunks import assert_same_chunk
from tests.support.commands import command, environment
from tests.support.nats import NatsRun, OwnNats
from tests.support.replay_runs import FREE, SETTINGS, Queue, replay_config, replaying, status_of
from tests.support.waiting import eventually


async def held(bus: Bus) -> dict[int, tuple[float, list[tuple[int, int]]]]:
    """By key: the probability of each sequence, and the numbers and rows of its chunks."""
    found = {}
    for _ in range(6):
        sample = await ReplayClient(bus).sample(100)
        for key, probability, sequence in zip(
            sample.keys.tolist(), sample.probabilities.tolist(), sample.sequences, strict=True
        ):
            chunks = [(chunk.header.number, chunk.header.first_row) for chunk in sequence]
            found[key] = (probability, chunks)
    return found


async def test_a_restart_goes_on_with_the_same_sequences_priorities_and_limiter(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, **FREE)
        async with replaying(config) as replay:
            await queue.fed(12)
            await queue.emptied()
            keys = np.array(sorted(await held(bus)), np.uint64)
            await ReplayClient(bus).update_priorities(keys, np.linspace(0.5, 1.5, len(keys)))
            before, status = await held(bus), await status_of(bus)
            await replay.stopped()
        async with replaying(config) as replay:
            after = await held(bus)
            assert {key: chunks for key, (_, chunks) in after.items()} == {
                key: chunks for key, (_, chunks) in before.items()
            }
            for key, (probability, _) in before.items():
                assert after[key][0] == pytest.approx(probability)
            now = await status_of(bus)
            for same in ("items", "bytes", "rows", "steps", "inserted_items"):
                assert now[same] == status[same], same
            assert now["balance"] == status["balance"] - 600
            # The run goes on where it was: the next chunk completes a sequence with those before the restart.
            await queue.fed(1)
            await queue.emptied()
            assert (await status_of(bus))["items"] == now["items"] + 2
            await replay.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.inserted, accounts.rolled_back, accounts.redelivered) == (13, 0, 0)


@pytest.mark.parametrize("has_snapshot", [True, False])
async def test_what_could_not_be_acknowledged_is_counted_once_however_often_replay_starts(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_snapshot: bool
) -> None:
    async def unheard(message: QueueMessage) -> None:
        await asyncio.Event().wait()

    async def dies(*_: object) -> None:
        raise RuntimeError("killed as soon as it had begun")

    config = replay_config(nats, tmp_path, grace_seconds=1.0, **FREE)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        with monkeypatch.context() as patch:
            patch.setattr(QueueMessage, "ack", unheard)
            async with replaying(config) as replay:
                await queue.fed(6, rows=2)
                await eventually(lambda: (load_accounts(tmp_path / "replay") or Accounts()).inserted == 6)
                await replay.stopped()
        if not has_snapshot:
            for snapshot in (tmp_path / "replay").glob("snapshot-*"):
                shutil.rmtree(snapshot)
        before = load_accounts(tmp_path / "replay")
        assert before is not None
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(replay_module.Replay, "_serve", dies)
                async with replaying(config, fails=True) as replay:
                    await asyncio.wait([replay.task])
            assert "as soon as" in str(replay.task.exception())
            accounts = await queue.exact_accounts(tmp_path)
            assert (accounts.steps, accounts.inserted) == (before.steps, 0)
        async with replaying(config) as replay:
            await queue.emptied()
            await replay.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.steps, accounts.inserted) == (before.steps, 6)
        assert accounts.inserted_items == before.inserted_items > 0


async def test_a_full_table_and_its_limiter_go_on_after_a_restart(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, replay_capacity=6)
        client = ReplayClient(bus)
        for _ in range(3):
            async with replaying(config) as replay:
                feeding = asyncio.create_task(queue.fed(20))
                while not feeding.done():
                    await client.sample(2)
                await feeding
                status = await status_of(bus)
                assert status["items"] == 6
                assert abs(status["balance"]) <= 4
                await replay.stopped()
        await queue.exact_accounts(tmp_path)


async def test_the_snapshot_before_a_damaged_one_is_restored(
    nats: NatsRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, **FREE)
        async with replaying(config) as replay:
            await queue.fed(5)
            await queue.emptied()
            await ReplayClient(bus).snapshot("good")
            await queue.fed(4)
            await queue.emptied()
            await replay.stopped()
        newest = tmp_path / "replay" / "snapshot-000000000002-end" / "index.npz"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        async with replaying(config) as replay:
            status = await eventually(lambda: _restored(bus))
            assert (status["items"], status["chunks"]["rolled_back"]) == (4, 4)
            await queue.fed(6)
            await queue.emptied()
            await replay.stopped()
        assert "index.npz does not match its hash" in capsys.readouterr().out
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.inserted, accounts.rolled_back) == (15, 4)


async def test_without_a_whole_snapshot_it_ends_and_begins_with_none_where_they_were_moved_away(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, **FREE)
        async with replaying(config) as replay:
            await queue.fed(5)
            await queue.emptied()
            await replay.stopped()
        (snapshot,) = (tmp_path / "replay").glob("snapshot-*")
        (snapshot / "index.npz").unlink()
        async with replaying(config, fails=True) as replay:
            with pytest.raises(RunError, match=f"no snapshot in {tmp_path}/replay is whole .*and leave its"):
                await replay.ended()
        assert snapshot.is_dir()
        snapshot.rename(tmp_path / snapshot.name)
        (tmp_path / "replay" / "rows").rename(tmp_path / "rows")
        async with replaying(config) as replay:
            await queue.fed(4)
            await queue.emptied()
            assert (await status_of(bus))["chunks"]["rolled_back"] == 5
            await replay.stopped()
        assert (await queue.exact_accounts(tmp_path)).inserted == 9


async def test_without_its_journal_it_goes_on_with_its_snapshot(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, **FREE)
        async with replaying(config) as replay:
            await queue.fed(5)
            await queue.emptied()
            await replay.stopped()
        (tmp_path / "replay" / "accounts.json").unlink()
        async with replaying(config) as replay:
            status = await eventually(lambda: _restored(bus))
            assert (status["items"], status["chunks"]["refused"]) == (4, 0)
            assert status["chunks"]["inserted"] == 5
            await replay.stopped()
        await queue.exact_accounts(tmp_path)


async def test_snapshots_of_another_run_are_refused(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, **FREE)) as replay:
            await queue.fed(3)
            await queue.emptied()
            await replay.stopped()
        other = replay_config(nats, tmp_path, sequence_length=4, **FREE)
        async with replaying(other, fails=True) as replay:
            with pytest.raises(RunError, match="cannot be used: the state has chunks per item, stride"):
                await replay.ended()
    renamed = NatsRun(nats.url, nats.token, nats.run_id + "-2")
    async with renamed.bus() as bus:
        await Queue.created(bus)
        async with replaying(replay_config(renamed, tmp_path, **FREE), fails=True) as replay:
            with pytest.raises(RunError, match="holds snapshots of another run"):
                await replay.ended()


async def test_a_client_waits_through_restarts_of_replay_and_of_nats(
    own_nats: OwnNats, tmp_path: Path
) -> None:
    async with own_nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(own_nats.run, tmp_path, **FREE)
        sampling = asyncio.create_task(ReplayClient(bus).sample(4))
        async with replaying(config) as replay:
            await queue.fed(4)
            assert (await asyncio.wait_for(sampling, 30)).size == 2
            await replay.stopped()
        sampling = asyncio.create_task(ReplayClient(bus).sample(4))
        await own_nats.kill()
        await own_nats.start()
        async with replaying(config):
            sample = await asyncio.wait_for(sampling, 60)
            assert sample.size == 2
            await own_nats.kill()
            await own_nats.start()
            await queue.fed(3)
            await queue.emptied()
            _assert_as_published(await ReplayClient(bus).sample(20), queue)


async def test_the_successor_of_a_stopped_replay_waits_until_that_has_ended(
    nats: NatsRun, tmp_path: Path
) -> None:
    """Continued, that one writes accounts and a snapshot once more."""
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        with _killed_at_last(_started(nats, tmp_path, **FREE)) as process:
            await queue.fed(6)
            await queue.emptied(timeout=60)
            process.send_signal(signal.SIGSTOP)
            await bus.js.purge_stream(f"KV_{bus.subjects.leases_bucket}")  # as after its time to live
            await queue.fed(6)
            async with replaying(replay_config(nats, tmp_path, **FREE)) as replay:

                async def waits() -> bool:
                    waiting = (await status_of(bus))["waiting"]
                    return any(f"replay, which process {process.pid} on " in words for words in waiting)

                await eventually(waits)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                await queue.emptied()
                await eventually(lambda: process.poll() is not None)
                await replay.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.inserted == 12


@pytest.mark.slow
async def test_killed_again_and_again_it_loses_only_what_came_after_its_snapshots_and_counts_it(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus, max_messages=20)
        sampling = asyncio.create_task(_sample_for_ever(bus))
        feeding = asyncio.create_task(queue.fed(400))
        for kill in range(4):
            process = _started(nats, tmp_path)
            inserted = 100 * kill

            async def has_moved(beyond: int = inserted) -> bool:
                return (await queue_state(bus)).last_sequence > beyond + 60

            await eventually(has_moved, timeout=60)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process = _started(nats, tmp_path)
        async with asyncio.timeout(60):
            await feeding
        await queue.emptied(timeout=60)
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        status = await status_of(bus)
        process.terminate()
        assert process.wait(30) == 0
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.inserted == 400
        assert accounts.steps == 400 * 2 * 4
        assert 0 < accounts.rolled_back < 400
        assert abs(status["balance"]) <= 4


async def _sample_for_ever(bus: Bus) -> None:
    client = ReplayClient(bus)
    while True:
        sample = await client.sample(2)
        await client.update_priorities(sample.keys, np.ones(2))


@pytest.mark.slow
async def test_no_sample_and_no_insert_waits_a_second_while_a_full_table_is_written(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        process = _started(nats, tmp_path, snapshot_seconds=1000, replay_capacity=20_000, **FREE)
        await queue.fed(800, rows=64)  # 25,600 sequences: the table is full
        await queue.emptied(timeout=120)
        assert (await status_of(bus))["items"] == 20_000
        client, samples, inserts = ReplayClient(bus), list[float](), list[float]()
        snapshot = asyncio.create_task(client.snapshot("whole"))
        while not snapshot.done():
            started = monotonic()
            await client.sample(64)
            samples.append(monotonic() - started)
            started = monotonic()
            await queue.fed(2, rows=64)
            await queue.emptied()
            inserts.append(monotonic() - started)
        assert snapshot.result()["items"] == 20_000
        assert len(samples) >= 3
        assert max(samples) < 1.0, samples
        assert max(inserts) < 1.0, inserts
        process.terminate()
        assert process.wait(60) == 0


def _started(nats: NatsRun, run_dir: Path, **changed: float) -> "subprocess.Popen[bytes]":
    settings = {**SETTINGS, "snapshot_seconds": 0.3, "replay_capacity": 1000, **changed}
    words = [
        f"--{name.replace('_', '-')}={value[0] if isinstance(value, tuple) else value}"
        for name, value in settings.items()
    ]
    where = ["--run-id", nats.run_id, "--run-dir", str(run_dir), "--nats-url", nats.url]
    return subprocess.Popen(
        command("replay", *where, *words), env=environment(SEEDRL_NATS_TOKEN=nats.token), cwd=run_dir
    )


@contextmanager
def _killed_at_last(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    with process:
        try:
            yield process
        finally:
            process.kill()


async def _restored(bus: Bus) -> dict[str, object] | None:
    status = await status_of(bus)
    return status if status["restored"] else None


def _assert_as_published(sample: ReplaySample, queue: Queue) -> None:
    for sequence in sample.sequences:
        for chunk in sequence:
            row = chunk.header.first_row
            assert_same_chunk(chunk, slice_rows(queue.chunks[chunk.header.number], row, row + 1))
