"""What several tests of the work queue do."""

import asyncio

from shared.bus.connection import Bus
from shared.bus.work_queue import QueueConsumer, QueueMessage


async def fetch_all(consumer: QueueConsumer, count: int) -> list[QueueMessage]:
    """Fetches until there are `count` messages."""
    messages: list[QueueMessage] = []
    async with asyncio.timeout(30):
        while len(messages) < count:
            messages += await consumer.fetch(count - len(messages), timeout=1)
    return messages


async def is_waiting(bus: Bus) -> bool:
    """Whether the consumer's request lies at the server."""
    info = await bus.js.consumer_info(bus.subjects.trajectories_stream, bus.subjects.trajectories_consumer)
    return bool(info.num_waiting)
