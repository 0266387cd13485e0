"""The learner with a real nats-server: every message accounted for, whatever comes and whatever happens."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

import services.learner.learner as learner_module
from services.learner.accounts import Accounts, load_accounts
from services.learner.batches import staged
from services.learner.rows import Slice
from services.learner.training import VTraceTrainer
from shared.accounts import write_accounts
from shared.addresses import free_port
from shared.bus.connection import Bus
from shared.bus.control import request_control
from shared.bus.episodes import publish_episodes
from shared.bus.weights import WeightsReader
from shared.checkpoints import latest_checkpoint, weights_from_bytes
from shared.errors import RunError
from shared.networks.build import build_network
from tests.support.learner_runs import (
    BATCH_SIZE,
    UNROLL,
    Queue,
    learner_config,
    learning,
)
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually


async def test_everything_published_is_trained_and_acknowledged(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.fed(20, rows=2)
            await queue.emptied()
            await learner.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.trained == 20
        assert accounts.steps == 20 * 2 * UNROLL
        assert accounts.updates == 20 * 2 // BATCH_SIZE
        assert (accounts.redelivered, accounts.rolled_back, sum(accounts.refused.values())) == (0, 0, 0)


async def test_initial_weights_and_a_checkpoint_come_before_the_first_trajectory(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)):
            weights = await eventually(lambda: WeightsReader(bus).newer_than(0))
            assert (weights.update, weights.network_hash) == (0, queue.spec.network_hash)
            checkpoint = latest_checkpoint(tmp_path / "checkpoints")
            assert checkpoint is not None
            for name, tensor in weights_from_bytes(weights.data).items():
                assert tensor.equal(checkpoint.weights[name])


async def test_a_learner_that_starves_says_so_in_its_share_and_which_weights_it_published(
    nats: NatsRun, tmp_path: Path
) -> None:
    port = free_port()
    async with nats.bus() as bus, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path, http_port=port)) as learner:
            weights = await eventually(lambda: WeightsReader(bus).newer_than(0))

            async def says() -> bool:
                async with http.get("/status") as answer:
                    status = await answer.json()
                is_known = status["weights_version"] == weights.version
                return is_known and status["waiting_share"] > 0.9

            await eventually(says, what="the wait and the version")
            await learner.stopped()


async def test_training_ends_with_its_steps_and_leaves_weights_checkpoint_and_reason(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = learner_config(nats, tmp_path, total_steps=10 * BATCH_SIZE * UNROLL)
        async with learning(config) as learner:
            await queue.fed(30)
            await learner.ended()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.updates == 10
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters == {"updates": 10, "effective_updates": 10, "steps": accounts.steps}
        weights = await WeightsReader(bus).newer_than(0)
        assert weights is not None
        assert weights.update == 10
        assert all(t.equal(checkpoint.weights[n]) for n, t in weights_from_bytes(weights.data).items())


async def test_weights_are_published_at_the_end_also_after_an_update_that_took_long(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "_SHARE_OF_GRACE", 0.0)  # as if the update had taken all of it
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = learner_config(nats, tmp_path, grace_seconds=60.0, publish_seconds=3600.0)
        async with learning(config) as learner:
            await eventually(lambda: WeightsReader(bus).newer_than(0))
            await queue.fed(2)
            await queue.emptied()
            await learner.stopped()
        weights = await WeightsReader(bus).newer_than(0)
        assert weights is not None
        assert weights.update == 1


async def test_the_last_status_says_why_training_ended(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        seen = []

        async def note(message: object) -> None:
            seen.append(message.data.decode())  # type: ignore[attr-defined]

        await bus.nc.subscribe(bus.subjects.status("learner", "*"), cb=note)
        async with learning(learner_config(nats, tmp_path, total_steps=1)) as learner:
            await queue.fed(2)
            await learner.ended()
        await eventually(lambda: seen and '"exit_reason":"total steps reached"' in seen[-1])
        assert '"updates":1' in seen[-1]


async def test_wall_time_ends_training_too(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path, max_seconds=0.2)) as learner:
            await queue.fed(2)
            await learner.ended()
        assert (await queue.exact_accounts(tmp_path)).seconds >= 0.2


async def test_a_message_larger_than_a_batch_is_acknowledged_with_its_last_row(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.fed(1, rows=BATCH_SIZE * 2 + 1)
            await eventually(lambda: load_accounts(tmp_path).updates == 2)
            assert not await queue.is_empty()
            await queue.fed(1, rows=BATCH_SIZE - 1)
            await queue.emptied()
            await learner.stopped()
        assert (await queue.exact_accounts(tmp_path)).updates == 3


async def test_a_full_queue_is_not_a_deadlock(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus, max_messages=3 * 2 + 1)
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.fed(60)
            await queue.emptied()
            await learner.stopped()
        assert (await queue.exact_accounts(tmp_path)).updates == 30


async def test_episodes_of_training_are_counted_and_those_of_evaluation_are_not(
    nats: NatsRun, tmp_path: Path
) -> None:
    episode = {"actor_id": "a", "stream_id": "s", "task": "t", "row": 0, "length": 7, "weights_version": 1}
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.fed(4)
            await publish_episodes(
                bus,
                [
                    {**episode, "role": role, "return": value}
                    for role, value in (("train", 1.0), ("eval", 100.0), ("train", 4.0))
                ],
            )
            await eventually(lambda: load_accounts(tmp_path).episodes == 2)
            await learner.stopped()
        assert load_accounts(tmp_path).mean_return_100 == 2.5


async def test_checkpoints_saved_in_between_hold_whole_updates(nats: NatsRun, tmp_path: Path) -> None:
    """Against the same training done by hand: weights of update N, or of no update at all, are in none."""
    config = learner_config(nats, tmp_path, keep_checkpoints=1000, checkpoint_seconds=0.01)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        chunks = [queue.chunk(rows=BATCH_SIZE) for _ in range(40)]
        async with learning(config):
            await queue.publish(*chunks)
            await queue.emptied()
        saved = {
            int(path.name.rpartition("-")[2]): path
            for path in (tmp_path / "checkpoints").glob("checkpoint-*")
        }
        assert len(saved) > 3
        torch.manual_seed(1)
        trainer = VTraceTrainer(build_network(queue.spec), config, device=torch.device("cpu"))
        for update, chunk in enumerate([None, *chunks]):
            if chunk is not None:
                batch = staged([Slice(chunk, 0, BATCH_SIZE)], reward_clip=0.0, device=trainer.device)
                trainer.train(batch, steps=0)
            if path := saved.get(update):
                weights = weights_from_bytes((path / "model.safetensors").read_bytes())
                assert all(tensor.equal(trainer.weights()[name]) for name, tensor in weights.items()), update


async def test_the_first_checkpoint_of_a_new_run_does_not_wait_for_its_time(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "_FIRST_CHECKPOINT_SECONDS", 0.01)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path, checkpoint_seconds=3600.0)):
            await queue.fed(2)
            await eventually(lambda: any((tmp_path / "checkpoints").glob("checkpoint-*1")))


async def test_what_is_awaited_is_told_over_http_until_training_begins(nats: NatsRun, tmp_path: Path) -> None:
    port = free_port()
    async with nats.bus() as bus, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:

        async def says(path: str, *words: str) -> bool:
            try:
                async with http.get(path) as answer:
                    text = await answer.text()
            except aiohttp.ClientConnectorError:
                return False
            return all(word in text for word in words)

        async with learning(learner_config(nats, tmp_path, http_port=port)):
            await eventually(lambda: says("/readyz", "the run's spec"))
            queue = await Queue.created(bus)
            await eventually(lambda: says("/readyz", "the first trajectory"))
            await queue.fed(2)
            await eventually(lambda: says("/status", '"updates":1', '"waiting":[]'))
            async with http.get("/readyz") as answer:
                assert answer.status == 200
            assert await says("/metrics", 'seedrl_learner_chunks_total{outcome="trained"} 2.0')


async def test_counters_go_on_where_they_were_before_anything_is_restored(
    nats: NatsRun, tmp_path: Path
) -> None:
    port = free_port()
    write_accounts(tmp_path, Accounts(steps=77, updates=5).to_json())
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http,
        learning(learner_config(nats, tmp_path, http_port=port, resume=True)),
    ):

        async def answers() -> str:
            try:
                async with http.get("/metrics") as answer:
                    return await answer.text()
            except aiohttp.ClientConnectorError:
                return ""

        assert "seedrl_learner_steps_total 77.0\n" in await eventually(answers)


async def test_a_server_that_is_away_is_waited_for(own_nats: OwnNats, tmp_path: Path) -> None:
    await own_nats.kill()
    async with learning(learner_config(own_nats.run, tmp_path)):
        await own_nats.start()
        async with own_nats.bus() as bus:
            queue = await Queue.created(bus)
            await queue.fed(2)
            await queue.emptied()
    assert load_accounts(tmp_path).trained == 2


async def test_a_learner_that_never_found_its_server_ends_at_once(own_nats: OwnNats, tmp_path: Path) -> None:
    await own_nats.kill()
    async with learning(learner_config(own_nats.run, tmp_path)) as learner, asyncio.timeout(5):
        await learner.stopped()


async def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    nats: NatsRun, tmp_path: Path
) -> None:
    checkpoints, away = tmp_path / "checkpoints", tmp_path / "away"
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = learner_config(nats, tmp_path, checkpoint_seconds=0.05)
        async with learning(config) as learner:
            await eventually(lambda: said(bus, "checkpoint"))
            checkpoints.rename(away)
            checkpoints.touch()
            await queue.fed(4)
            await eventually(lambda: said(bus, "checkpoint_failures"))
            (answer,) = await request_control(bus, "checkpoint", timeout=10)
            assert answer["done"].startswith("failed: cannot write checkpoint in ")
            assert answer["failed"] == RunError.exit_status
            checkpoints.unlink()
            away.rename(checkpoints)
            await queue.fed(4)
            await queue.emptied()
            await eventually(lambda: any(checkpoints.glob("checkpoint-*4")))
            await learner.stopped()
        assert (await queue.exact_accounts(tmp_path)).updates == 4


async def said(bus: Bus, name: str) -> Any:
    """What the learner's status says; None before there is a learner."""
    answers = await request_control(bus, "status", timeout=10)
    return answers[0]["status"][name] if answers else None


async def test_a_last_checkpoint_that_cannot_be_written_ends_the_learner_with_the_reason(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path), fails=True) as learner:
            await eventually(lambda: said(bus, "checkpoint"))
            (tmp_path / "checkpoints").rename(tmp_path / "away")
            (tmp_path / "checkpoints").touch()
            await queue.fed(2)
            await queue.emptied()
            with pytest.raises(RunError, match="cannot write checkpoint in "):
                await learner.stopped()


# Control


async def test_control_saves_a_checkpoint_and_stops(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.fed(4)
            await queue.emptied()
            (saved,) = await request_control(bus, "checkpoint", timeout=10)
            assert saved["done"] == "saved checkpoint-000000000002 at update 2"
            (status,) = await request_control(bus, "status", timeout=10)
            assert status["status"]["checkpoint"] == "checkpoint-000000000002"
            assert status["status"]["chunks"]["trained"] == 4
            assert status["status"]["exit_reason"] is None
            (stopped,) = await request_control(bus, "stop", timeout=10)
            assert stopped["done"] == "stops; saved checkpoint-000000000002 at update 2"
            await learner.ended()
        await queue.exact_accounts(tmp_path)


async def test_before_training_there_is_nothing_to_save_and_stop_ends_at_once(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus, learning(learner_config(nats, tmp_path)) as learner:
        await eventually(lambda: request_control(bus, "status", timeout=10))
        (answer,) = await request_control(bus, "checkpoint", timeout=10)
        assert answer["done"] == "failed: there is nothing to save before training has begun"
        (status,) = await request_control(bus, "status", timeout=10)
        assert status["status"]["waiting"] == ["the run's spec, which the first actor's environment decides"]
        await request_control(bus, "stop", timeout=10)
        await learner.ended()
    assert latest_checkpoint(tmp_path / "checkpoints") is None
