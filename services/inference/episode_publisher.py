"""Brings finished episodes to NATS, gathered for a moment so that many travel in one message."""

import asyncio
import secrets
from collections import deque
from typing import Any

from shared.bus.connection import Bus
from shared.bus.episodes import publish_episodes
from shared.errors import ConnectionFailed
from shared.telemetry import get_logger

_GATHER_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_MOST_WAITING = 10_000

log = get_logger(__name__)


class EpisodePublisher:
    """While NATS is away, the newest 10,000 episodes wait."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MOST_WAITING)
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
        """Publishes what waits now."""
        async with self._turn:
            episodes = list(self._waiting)
            self._waiting.clear()
            message_id = secrets.token_hex(8)
            while episodes:
                try:
                    await publish_episodes(self._bus, episodes, message_id=message_id)
                except ConnectionFailed:
                    await self._bus.connected()
                    await asyncio.sleep(_RETRY_SECONDS)
                else:
                    return
