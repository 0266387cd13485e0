"""The newest status of every service, as they publish it each second."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import nats.errors
import orjson

from shared.bus.connection import Bus

NATS_KEEPS_NOTHING = "NATS to keep chunks"
"""With which inference's `waiting` begins to say that NATS is there and takes none, though not full."""

Status = dict[str, Any]
_LIVE_SECONDS = 5.0


class StatusBoard:
    """Newest statuses by service and id; what a dead service had counted is kept."""

    def __init__(self) -> None:
        self._newest: dict[tuple[str, str], Status] = {}

    def note(self, service: str, service_id: str, status: Status) -> None:
        """Takes a status of service `service_id`."""
        self._newest[service, service_id] = {**status, "seen": time.monotonic()}

    def newest(self, service: str) -> Status:
        """The newest status of any instance of `service`; empty before the first."""
        found = [status for (name, _), status in self._newest.items() if name == service]
        return max(found, key=lambda status: float(status["seen"]), default={})

    def live(self, service: str) -> list[Status]:
        """The newest status of each instance of `service` that said something in the last seconds."""
        since = time.monotonic() - _LIVE_SECONDS
        return [
            status for (name, _), status in self._newest.items() if name == service and status["seen"] > since
        ]

    def total(self, service: str, key: str) -> int:
        """The sum of a counter over all instances of `service` there ever were."""
        return sum(int(status.get(key, 0)) for (name, _), status in self._newest.items() if name == service)


@contextlib.asynccontextmanager
async def watched_statuses(bus: Bus, board: StatusBoard | None = None) -> AsyncIterator[StatusBoard]:
    """A board, or this one, that follows the run's status messages."""
    board = board or StatusBoard()

    async def note(message: Any) -> None:
        service, service_id = message.subject.rsplit(".", 2)[1:]
        board.note(service, service_id, orjson.loads(message.data))

    subscription = await bus.nc.subscribe(bus.subjects.status("*", "*"), cb=note)
    try:
        yield board
    finally:
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()
