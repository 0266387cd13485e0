"""The NATS server of a local run: an embedded one that is started again when it dies, or the user's own."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from services.local.config import TrainConfig
from services.local.supervisor import RestartPolicy, ServiceFailed
from services.nats_server import embedded_nats
from shared.bus.beside import beside
from shared.config import NatsSettings
from shared.errors import RunError

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def nats_of_run(config: TrainConfig) -> AsyncIterator[NatsSettings]:
    """How to reach the run's NATS server during the block. Raises ServiceFailed when it keeps dying."""
    if config.nats_url is not None:
        yield NatsSettings.of(config)
        return
    started: asyncio.Future[NatsSettings] = asyncio.get_running_loop().create_future()
    async with beside(_kept_running(config.directory / "nats", started)):
        yield await started


async def _kept_running(directory: Path, started: asyncio.Future[NatsSettings]) -> None:
    port, token, policy = 0, secrets.token_hex(16), RestartPolicy()
    while True:
        try:
            async with embedded_nats(directory, port=port, token=token) as server:
                port = server.port  # services look for it where they found it
                if not started.done():
                    started.set_result(server.settings)
                await server.stays()
        except RunError as error:
            if not started.done():
                raise
            words = str(error)
        delay = policy.delay_after_crash(time.monotonic())
        if delay is None:
            raise ServiceFailed(f"nats-server keeps dying: {words}", 1)
        log.warning("nats-server died; starting it again", last_words=words)
        await asyncio.sleep(delay)
