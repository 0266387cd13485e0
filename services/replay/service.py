"""The replay service: its HTTP endpoints, its connection, its control, around one replay."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from services.replay.accounts import Accounts, load_accounts
from services.replay.config import ReplayConfig
from services.replay.metrics import ReplayMetrics, ReportMetrics
from services.replay.replay import Replay
from services.replay.report import Report
from shared.bus.beside import beside
from shared.bus.connection import RETRY_SECONDS, Bus, connected_bus
from shared.bus.control import publish_status, serve_control
from shared.bus.key_values import LEARNER_LEASE, lease_owner
from shared.errors import ConfigurationError, ConnectionFailed
from shared.http import new_registry, serving_http
from shared.secrets import without_credentials
from shared.telemetry import Progress

SERVICE = "replay"


class _NothingToEnd(Exception):
    """Stopped before anything was restored."""


async def run(config: ReplayConfig, *, stop: asyncio.Event) -> None:
    """Keeps the sequences of the run `config.run_id` until `stop` is set, then writes a snapshot.

    Raises RunError for a directory, and ConfigurationError for settings, that are not the run's; Refused
    when the run has a replay already; some of them in an ExceptionGroup.
    """
    if config.agent != "r2d2":
        raise ConfigurationError(f"replay is for --agent r2d2, not {config.agent}")
    accounts = load_accounts(config.replay_dir) or Accounts()  # before anybody asks
    report = Report(
        nats=without_credentials(config.nats_url), accounts=accounts, journaled_steps=lambda: accounts.steps
    )
    progress, registry = Progress(), new_registry()
    registry.register(ReportMetrics(report))
    metrics = ReplayMetrics(registry)
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
        replay = Replay(config, bus, report, metrics, owner=me)
        over = asyncio.Event()
        control = serve_control(bus, SERVICE, me, _handlers(replay, over), report.status)
        with suppress(_NothingToEnd):
            async with beside(_heed(stop, replay), _linger(config, bus, over, stop), control):
                await replay.run(stop)
                await publish_status(bus, SERVICE, me, report.status())


def _handlers(replay: Replay, over: asyncio.Event) -> dict[str, Callable[[], Awaitable[str]]]:
    async def stopped() -> str:
        over.set()
        return "stops when the learner has, and writes a snapshot"

    return {"checkpoint": replay.save, "stop": stopped}


async def _linger(config: ReplayConfig, bus: Bus, over: asyncio.Event, stop: asyncio.Event) -> None:
    """After the run was stopped, stays for the learner's last priorities and snapshot, for a while."""
    await over.wait()
    with suppress(TimeoutError, ConnectionFailed):
        async with asyncio.timeout(config.grace_seconds):
            while True:
                if await lease_owner(bus, LEARNER_LEASE) is None:
                    break
                await asyncio.sleep(RETRY_SECONDS)
    stop.set()


async def _heed(stop: asyncio.Event, replay: Replay) -> None:
    await stop.wait()
    if not replay.is_serving:
        raise _NothingToEnd
