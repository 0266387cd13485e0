"""What the learner refuses: chunks, which are counted, and starts, which end in one clear error."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.bus.key_values import create_spec
from shared.bus.weights import WeightsReader
from shared.checkpoints import latest_checkpoint
from shared.errors import ConfigurationError, Refused, RunError, TrainingDiverged
from shared.networks.interface import NetworkInput, Output, State
from shared.networks.mlp import MlpNetwork
from tests.support.learner_chunks import make_chunk
from tests.support.learner_runs import UNROLL, Queue, learner_config, learner_spec, learning
from tests.support.nats import NatsRun
from tests.support.waiting import eventually


async def test_what_is_no_chunk_or_another_runs_is_refused_and_disturbs_nothing(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        alien = replace(queue.chunk(), header=replace(queue.chunk().header, network_hash="0123456789abcdef"))
        shorter = make_chunk(spec=learner_spec(unroll=UNROLL - 1), run_id=bus.run_id)
        shorter = replace(shorter, header=replace(shorter.header, network_hash=queue.spec.network_hash))
        async with learning(learner_config(nats, tmp_path)) as learner:
            await queue.publish(queue.chunk(), b"no chunk", alien, queue.chunk(), b"", shorter)
            await queue.emptied()
            await learner.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.trained == 2
        assert accounts.refused == {"lag": 0, "spec": 2, "undecodable": 2, "lost": 0}
        assert accounts.steps == 2 * (3 * UNROLL + UNROLL - 1)
        assert accounts.updates == 1


async def test_a_chunk_of_weights_that_are_too_old_is_refused(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path, max_policy_lag=3)) as learner:
            await queue.fed(8 * 2, update=0)  # enough for 8 updates, but only 4 have a lag of 0 … 3
            await queue.emptied()
            await learner.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.updates == 4
        assert accounts.refused["lag"] == 8
        assert dict(accounts.lags) == {0: 2, 1: 2, 2: 2, 3: 2}
        assert accounts.steps == 16 * 2 * UNROLL


async def test_a_second_learner_is_refused_by_name(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path / "one")):
            await eventually(lambda: WeightsReader(bus).newer_than(0))
            async with learning(learner_config(nats, tmp_path / "two"), fails=True) as second:
                with pytest.raises(Refused, match=r"lease 'learner' .* is held by .*-\d+"):
                    await second.ended(timeout=30)


async def test_settings_that_are_not_the_runs_are_refused_in_words(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        await create_spec(bus, learner_spec(lstm_size=16))
        async with learning(learner_config(nats, tmp_path), fails=True) as learner:
            with pytest.raises(ConfigurationError, match="network lstm_size is 0, the run's is 16"):
                await learner.ended()


class NeverForgets(MlpNetwork):
    """A memory that goes on over the end of an episode."""

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        return super().forward(inputs._replace(is_first=torch.zeros_like(inputs.is_first)), state)


async def test_a_network_with_a_memory_that_does_not_work_is_refused(nats: NatsRun, tmp_path: Path) -> None:
    name = f"{__name__}:NeverForgets"
    async with nats.bus() as bus:
        await create_spec(bus, learner_spec(network=name, lstm_size=8))
        config = learner_config(nats, tmp_path, network=name, lstm_size=8)
        async with learning(config, fails=True) as learner:
            with pytest.raises(ConfigurationError, match=r"NeverForgets breaks its contract: .*is_first"):
                await learner.ended()


async def test_a_run_directory_that_holds_a_run_needs_resume(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path)):
            await eventually(lambda: latest_checkpoint(tmp_path / "checkpoints"))
        async with learning(learner_config(nats, tmp_path), fails=True) as learner:
            with pytest.raises(RunError, match="holds a run; give --resume"):
                await learner.ended()


async def test_another_runs_checkpoint_is_refused_in_words(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus, nats.bus(run_id=f"{nats.run_id}-two") as other:
        await Queue.created(bus)
        await Queue.created(other, spec=learner_spec(actions=5))
        async with learning(learner_config(nats, tmp_path)):
            await eventually(lambda: latest_checkpoint(tmp_path / "checkpoints"))
        second = learner_config(nats, tmp_path, run_id=other.run_id, resume=True)
        async with learning(second, fails=True) as learner:
            with pytest.raises(RunError, match=r"checkpoint-0+ is of another run: .*actions"):
                await learner.ended()


async def test_another_run_directory_for_a_run_that_was_trained_is_refused(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with learning(learner_config(nats, tmp_path / "one")):
            await queue.fed(4)
            await queue.emptied()
        async with learning(learner_config(nats, tmp_path / "two"), fails=True) as learner:
            with pytest.raises(
                RunError, match="4 chunks of this run were consumed by a learner with another"
            ):
                await learner.ended()


async def test_a_loss_that_is_not_finite_ends_training_and_saves_nothing(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        absurd = queue.chunk()
        absurd.reward[:] = np.float32(1e38)
        async with learning(learner_config(nats, tmp_path), fails=True) as learner:
            await queue.fed(2)
            await queue.emptied()
            await queue.publish(absurd, queue.chunk())
            with pytest.raises(TrainingDiverged, match="diverged at update 2: the policy loss is inf"):
                await learner.ended()
        checkpoint = latest_checkpoint(tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.counters["updates"] == 0
        assert (await queue.exact_accounts(tmp_path)).updates == 1
