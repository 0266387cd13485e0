"""Trouble in a real run raises the alert for it, and a run in which nothing is wrong raises none."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from shared.bus.connection import Bus
from shared.bus.replay import ReplayClient
from shared.bus.weights import publish_weights
from shared.bus.work_queue import publish_chunk
from shared.errors import QueueFull, Refused
from tests.support.commands import seedrl
from tests.support.local_run import LocalRun, training
from tests.support.nats import NatsRun
from tests.support.prometheus import Prometheus, running_prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENDLESS = ("--total-steps", "1000000000")
CARTPOLE = ("CartPole-v1", "--preset", "cartpole", "--actors", "2", *ENDLESS)
OLD = (
    '1 - rate(seedrl_learner_policy_lag_updates_bucket{le="16.0"}[20s]) '
    "/ ignoring (le) rate(seedrl_learner_policy_lag_updates_count[20s])"
)
OF_LOAD = {"SeedrlQueueFull", "SeedrlPolicyLag"}  # what a busy machine may raise with these short times


def see(prometheus: Prometheus, run: LocalRun, *services: str) -> None:
    """Lets the server watch the run, once these services have an address and updates are done."""
    run.until(lambda: set(services) <= run.http_addresses().keys())
    run.until(lambda: run.accounts().get("updates", 0) > 0, seconds=90)
    prometheus.watch(run.http_addresses())
    prometheus.until_data("up == 1", len(services))
    prometheus.until_silent("SeedrlServiceDown")  # they were missed so far


def on_the_bus(run: LocalRun, act: Callable[[Bus], Awaitable[Any]]) -> None:
    """Does something on the run's NATS, as anybody with its token can."""
    reach = run.connection()
    nats = NatsRun(reach["nats_url"], reach["nats_token"], reach["run_id"])

    async def do() -> None:
        async with nats.bus(patient=False) as bus:
            await act(bus)

    asyncio.run(do())


def send_garbage(address: str) -> None:
    """What is no ActRequest, as an actor in another language might send it."""

    async def send() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.stream_stream("/seedrl.v1.Inference/Act")()
            await call.write(b"\xff\xff\xff")
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(send())


async def publish_nonsense(bus: Bus) -> None:
    """Messages that are no chunks, as a program of another version might send them."""
    for number in range(5):
        while True:
            with contextlib.suppress(QueueFull):
                await publish_chunk(bus, b"no chunk", f"trouble/{number}")
                break
            await asyncio.sleep(0.01)  # the run's own chunks fill the queue; nothing tells of room


def killed(prometheus: Prometheus, run: LocalRun, name: str) -> None:
    """Kills the service and lets the server find what comes in its place."""

    def start() -> object:
        found = prometheus.query(f'process_start_time_seconds{{instance="{name}"}}')
        return found[0]["value"][1] if found else None

    before, address = start(), run.http_addresses()[name]
    os.kill(run.pid(name), signal.SIGKILL)
    run.until(lambda: run.http_addresses()[name] != address)
    prometheus.watch(run.http_addresses())
    prometheus.until(lambda: start() not in (before, None), what="its successor")


def test_troubles_of_a_vtrace_run(tmp_path: Path) -> None:
    with (
        running_prometheus(tmp_path / "prometheus") as prometheus,
        training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run,
    ):
        see(prometheus, run, "actor-0", "actor-1", "inference", "learner")
        run.until_steps(run.accounts()["steps"] + 20_000)
        assert prometheus.firing().keys() <= OF_LOAD

        for _ in range(5):
            send_garbage(run.connection()["inference_url"])
        assert "garbage" in prometheus.until_firing("SeedrlRefusedInput", reason="garbage")
        on_the_bus(run, publish_nonsense)
        assert "learner has refused" in prometheus.until_firing("SeedrlChunksRefused", job="learner")

        assert seedrl("control", "pause", run.directory, cwd=tmp_path).returncode == 0
        prometheus.until_firing("SeedrlNoSteps")
        prometheus.until_firing("SeedrlNoProgress", instance="learner")
        # The learner has nothing to publish over these.
        on_the_bus(run, lambda bus: publish_weights(bus, b"no weights", update=1, network_hash="another's"))
        prometheus.until_firing("SeedrlRefusedWeights", instance="inference")
        assert seedrl("control", "resume", run.directory, cwd=tmp_path).returncode == 0
        prometheus.until_silent("SeedrlNoSteps", "SeedrlNoProgress")

        learner = run.pid("learner")
        os.kill(learner, signal.SIGSTOP)
        prometheus.until_firing("SeedrlServiceDown", instance="learner")
        assert "of the time actors wait" in prometheus.until_firing("SeedrlQueueFull", instance="inference")
        os.kill(learner, signal.SIGCONT)
        prometheus.until_silent("SeedrlServiceDown")
        addresses = run.http_addresses()
        prometheus.watch({name: addresses[name] for name in addresses if name != "learner"})
        assert "is gone" in prometheus.until_firing("SeedrlServiceDown", job="learner")
        prometheus.watch(addresses)
        prometheus.until_silent("SeedrlServiceDown")

        for _ in range(3):
            killed(prometheus, run, "actor-0")
        assert "has started 3 times anew" in prometheus.until_firing("SeedrlRestarts", instance="actor-0")
        run.end()


def test_old_trajectories_crashing_environments_and_strangers(tmp_path: Path) -> None:
    trouble = ("tests.support.actor_environments:Trouble-v0", "--env-kwargs", '{"trouble": "step", "at": 50}')
    old = ("--publish-seconds", "5", "--max-policy-lag", "100000", "--batch-size", "2")
    with (
        running_prometheus(tmp_path / "prometheus") as prometheus,
        training(
            *(*trouble, "--preset", "cartpole", *old, *ENDLESS),
            directory=tmp_path / "run",
            cwd=tmp_path,
            SEEDRL_INFERENCE_TOKEN="the-right-one",
        ) as run,
    ):
        see(prometheus, run, "actor-0", "inference", "learner")
        prometheus.until_firing("SeedrlEnvironmentsCrash", instance="actor-0")
        assert "more than 16 updates old" in prometheus.until_firing("SeedrlPolicyLag", instance="learner")
        reach = run.connection()
        where = ("--inference-url", reach["inference_url"], "--run-id", reach["run_id"])
        assert seedrl("actor", trouble[0], *where, cwd=tmp_path).returncode == 4
        prometheus.until_firing("SeedrlRefusedConnections", reason="token")
        run.end()


def test_troubles_of_replay(tmp_path: Path) -> None:
    few = (
        "--min-replay-size",
        "50",
        "--replay-capacity",
        "1000",
        "--eval-episodes",
        "0",
        "--snapshot-seconds",
        "2",
    )
    with (
        running_prometheus(tmp_path / "prometheus") as prometheus,
        training(
            "CartPole-v1", "--agent", "r2d2", *few, *ENDLESS, directory=tmp_path / "run", cwd=tmp_path
        ) as run,
    ):
        see(prometheus, run, "actor-0", "inference", "replay", "learner")
        # Those of its trainings that were more than 16 updates old, in the range that the alert looks at.
        prometheus.until_data(f"{OLD} > 0.5")
        assert prometheus.firing().keys() <= {"SeedrlQueueFull"}

        async def sends_no_number(bus: Bus) -> None:
            client = ReplayClient(bus)
            await client.update_priorities((await client.sample(1)).keys, np.array([np.nan]))

        on_the_bus(run, sends_no_number)
        prometheus.until_firing("SeedrlReplayRefusals", instance="replay")
        prometheus.until_silent("SeedrlReplayRefusals")

        async def asks_for_too_much(bus: Bus) -> None:
            with pytest.raises(Refused):
                await ReplayClient(bus).sample(2000)

        on_the_bus(run, asks_for_too_much)
        prometheus.until_firing("SeedrlReplayRefusals", instance="replay")

        rows = run.directory / "replay/rows"
        run.until(rows.exists)
        rows.rename(tmp_path / "away")
        rows.write_text("no directory")
        prometheus.until_firing("SeedrlSnapshotsFail", instance="replay")
        run.end()
