"""The learner service: its HTTP endpoints, its connection, its control, around one learner."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import torch

from services.learner.accounts import load_accounts
from services.learner.config import LearnerConfig
from services.learner.learner import Learner
from services.learner.metrics import LearnerMetrics
from services.learner.report import Report
from services.learner.session import check_run_dir
from shared.bus.beside import beside
from shared.bus.connection import connected_bus
from shared.bus.control import publish_status, serve_control
from shared.bus.replay import ReplayClient
from shared.http import new_registry, serving_http
from shared.networks.build import check_network_name
from shared.secrets import without_credentials
from shared.telemetry import Progress

SERVICE = "learner"


class _NothingToEnd(Exception):
    """Stopped before training began."""


async def run(config: LearnerConfig, *, stop: asyncio.Event) -> None:
    """Trains the run `config.run_id` until it is done or `stop` is set, then saves.

    Raises RunError for a run directory, and ConfigurationError for settings, that are not the run's; Refused
    when the run has a learner already; TrainingDiverged when a loss or gradient is not finite.
    """
    torch.set_num_threads(config.torch_threads)
    check_network_name(config.network)
    check_run_dir(config)
    report = Report(
        nats=without_credentials(config.nats_url),
        agent=config.agent,
        accounts=load_accounts(config.directory),  # before anybody asks
    )
    progress, registry = Progress(), new_registry()
    registry.register(LearnerMetrics(report))
    me = f"{socket.gethostname()}-{os.getpid()}"
    async with (
        serving_http(
            config,
            service=SERVICE,
            is_ready=report.waiting,
            status=report.status,
            registry=registry,
            progress=progress,
        ),
        connected_bus(config, run_id=config.run_id, name=SERVICE, patient=True) as bus,
    ):
        report.nats, report.is_connected = bus.address, lambda: bus.is_connected
        replay = ReplayClient(bus) if config.agent == "r2d2" else None
        learner = Learner(config, bus, report, progress, owner=me, replay=replay)
        handlers = _handlers(learner, stop)
        with suppress(_NothingToEnd):
            async with beside(_heed(stop, learner), serve_control(bus, SERVICE, me, handlers, report.status)):
                await learner.run()
                await publish_status(bus, SERVICE, me, report.status())


def _handlers(learner: Learner, stop: asyncio.Event) -> dict[str, Callable[[], Awaitable[str]]]:
    async def stopped() -> str:
        done = "there was nothing to save yet"
        if learner.is_training:
            done = await learner.save(with_snapshot=False)  # its end lets replay write one
        stop.set()
        return f"stops; {done}"

    return {"checkpoint": learner.save, "stop": stopped}


async def _heed(stop: asyncio.Event, learner: Learner) -> None:
    await stop.wait()
    learner.end("stopped")
    if not learner.is_training:
        raise _NothingToEnd
