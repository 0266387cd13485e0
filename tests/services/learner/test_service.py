"""The learner with a real nats-server: every message accounted for, whatever happens."""

import asyncio
from pathlib import Path

import pytest

from services.learner.accounts import load_accounts
from shared.bus.weights import WeightsReader
from shared.checkpoints import latest_checkpoint
from tests.support.learner_runs import BATCH_SIZE, UNROLL, Queue, learner_config, learning
from tests.support.nats import NatsRun
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
