"""What services of a run say each second."""

import asyncio
from typing import Any

import orjson
from nats.aio.msg import Msg

from shared.bus.connection import Bus


async def collect_statuses(bus: Bus, seconds: float) -> list[dict[str, Any]]:
    """The newest status of every service that published one within `seconds`."""
    newest: dict[str, dict[str, Any]] = {}

    async def take(message: Msg) -> None:
        newest[message.subject] = orjson.loads(message.data)

    subscription = await bus.nc.subscribe(bus.subjects.status("*", "*"), cb=take)
    await asyncio.sleep(seconds)
    await subscription.unsubscribe()
    return list(newest.values())
