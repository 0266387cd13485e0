"""The NATS server of a local run: an embedded one that is started again when it dies, or the user's own."""

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import structlog

from services.local.config import TrainConfig
from services.local.supervisor import RestartPolicy, ServiceFailed
from services.nats_server import NatsServer, embedded_nats
from shared.bus.beside import beside
from shared.bus.statuses import NATS_KEEPS_NOTHING
from shared.config import NatsSettings
from shared.errors import SeedrlError

_LOOK_SECONDS = 1.0
_REFUSES_SECONDS = 15.0  # longer than any answer takes that still comes
_ROOM_BYTES = 16 * 2**20

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def nats_of_run(
    config: TrainConfig, inference_waits_for: Callable[[], Iterable[str]] = tuple
) -> AsyncIterator[NatsSettings]:
    """How to reach the run's NATS server during the block. Raises ServiceFailed when it keeps dying.

    An embedded one is started again also where `inference_waits_for` it to keep chunks although its disk has
    room: once it could not write, it refuses for ever.
    """
    if config.nats_url is not None:
        yield NatsSettings.of(config)
        return
    server = _Embedded(config.directory / "nats")
    async with beside(server.keep_running(), server.revive(inference_waits_for)):
        yield await server.settings


class _Embedded:
    """A server in `directory`, with the port and the token of its first start at each other one."""

    def __init__(self, directory: Path) -> None:
        self.settings: asyncio.Future[NatsSettings] = asyncio.get_running_loop().create_future()
        self._directory = directory
        self._running: NatsServer | None = None

    async def keep_running(self) -> None:
        port, token, policy = 0, secrets.token_hex(16), RestartPolicy()
        while True:
            try:
                async with embedded_nats(self._directory, port=port, token=token) as self._running:
                    port = self._running.port  # services look for it where they found it
                    if not self.settings.done():
                        self.settings.set_result(self._running.settings)
                    await self._running.stays()
            except (SeedrlError, OSError) as error:
                if not self.settings.done():
                    raise
                words = str(error)
            delay = policy.delay_after_crash(time.monotonic())
            if delay is None:
                raise ServiceFailed(f"nats-server keeps dying: {words}", 1)
            log.warning("nats-server died; starting it again", last_words=words)
            await asyncio.sleep(delay)

    async def revive(self, inference_waits_for: Callable[[], Iterable[str]]) -> None:
        refuses_since: float | None = None
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            if not any(reason.startswith(NATS_KEEPS_NOTHING) for reason in inference_waits_for()):
                refuses_since = None
                continue
            refuses_since = now if refuses_since is None else refuses_since
            if now - refuses_since >= _REFUSES_SECONDS and self._has_room() and self._running is not None:
                refuses_since = now
                log.warning("nats-server keeps nothing although its disk has room; starting it again")
                with contextlib.suppress(ProcessLookupError):
                    self._running.process.terminate()

    def _has_room(self) -> bool:
        try:
            return shutil.disk_usage(self._directory).free >= _ROOM_BYTES
        except FileNotFoundError:  # a server that starts makes it again
            return True
