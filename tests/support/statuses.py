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


async def next_status(bus: Bus, service: str) -> dict[str, Any]:
    """What `service` says next."""
    said: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def take(message: Msg) -> None:
        if not said.done():
            said.set_result(orjson.loads(message.data))

    subscription = await bus.nc.subscribe(bus.subjects.status(service, "*"), cb=take)
    async with asyncio.timeout(20):
        status = await said
    await subscription.unsubscribe()
    return status
