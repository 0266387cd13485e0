"""Brings finished episodes to NATS, gathered for a moment so that many travel in one message."""

import asyncio
import secrets
from collections import deque
from typing import Any, NamedTuple

from shared.bus.connection import Bus
from shared.bus.episodes import publish_episodes
from shared.errors import ConnectionFailed
from shared.telemetry import get_logger

_GATHER_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_MOST_WAITING = 10_000

log = get_logger(__name__)


class _Batch(NamedTuple):
    """Episodes that were, or may have been, sent, and by what NATS knows them again."""

    episodes: list[dict[str, Any]]
    message_id: str


class EpisodePublisher:
    """While NATS is away, the newest 10,000 episodes wait, and those that were on their way."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MOST_WAITING)
        self._leaving: _Batch | None = None
        self._arrived = asyncio.Event()
        self._turn = asyncio.Lock()

    def add(self, episode: dict[str, Any]) -> None:
        """Publishes `episode` soon."""
        self._waiting.append(episode)
        self._arrived.set()

    async def run(self) -> None:
        """Publishes what is added, for ever."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await asyncio.sleep(_GATHER_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Publishes what waits now; after one that was cancelled, first what that had begun to publish."""
        async with self._turn:
            await self._send()
            if self._waiting:
                self._leaving = _Batch(list(self._waiting), secrets.token_hex(8))
                self._waiting.clear()
                await self._send()

    async def _send(self) -> None:
        while self._leaving is not None:
            try:
                await publish_episodes(self._bus, self._leaving.episodes, message_id=self._leaving.message_id)
            except ConnectionFailed:
                await self._bus.connected()
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._leaving = None
