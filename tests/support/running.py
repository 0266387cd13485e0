"""A service in the test's own process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class RunningService:
    """A service's task."""

    def __init__(self, task: "asyncio.Task[None]", stop: asyncio.Event) -> None:
        self.task = task
        self._stop = stop

    async def ended(self, *, timeout: float = 20.0) -> None:
        """Waits until it ends by itself; raises what it raised."""
        async with asyncio.timeout(timeout):
            await asyncio.shield(self.task)

    async def stopped(self) -> None:
        """Stops it as SIGTERM does and waits."""
        self._stop.set()
        await self.ended()


@asynccontextmanager
async def running(
    service: Callable[[asyncio.Event], Awaitable[None]], *, fails: bool = False
) -> AsyncIterator[RunningService]:
    """What `service(stop)` runs; stopped at the end, if it still runs. What it raises is raised, unless it
    is said that it `fails`.
    """

    async def run() -> None:
        await service(stop)

    stop = asyncio.Event()
    task = asyncio.create_task(run())
    try:
        yield RunningService(task, stop)
    finally:
        stop.set()
        await asyncio.wait([task])
    if not fails:
        task.result()
