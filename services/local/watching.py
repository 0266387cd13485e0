"""What the actors of a local run say of themselves, over HTTP: inference knows only those connected to it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 1.0

_STARTING = "starting"
_MAKING = "making environments"


class ActorAccount:
    """One actor by its own account; knows no connection and no clock."""

    def __init__(self, now: float) -> None:
        """`now`: monotonic seconds, as everywhere here."""
        self._doing = _STARTING  # before its groups are connected; then empty
        self._since = now
        self.last_crash = ""
        self._replaced = 0  # by its process
        self._replaced_before = 0  # by those before it

    def answered(self, status: Mapping[str, Any], now: float) -> None:
        """Takes its /status."""
        waiting = ", ".join(status["waiting_for"])
        self._does(_MAKING if status["making_environments"] else waiting and f"waiting for {waiting}", now)
        replaced = status["replaced_environments"]
        if replaced < self._replaced:  # another process, which counts from 0
            self._replaced_before += self._replaced
        self._replaced = replaced
        self.last_crash = status["last_crash"] or self.last_crash

    @property
    def replaced(self) -> int:
        """Environments that crashed, also those of its earlier processes."""
        return self._replaced_before + self._replaced

    def was_silent(self, now: float) -> None:
        """It listens and does not answer: some environments are made without a break."""
        if self._doing == _STARTING:
            self._does(_MAKING, now)

    def was_away(self, now: float) -> None:
        """Nobody listens there; one that stepped may just have come to its end."""
        if self._doing:
            self._does(_STARTING, now)

    def doing(self, now: float) -> str:
        """What it does before it steps, and for how long; empty when it steps."""
        return f"{self._doing} for {now - self._since:.0f} s" if self._doing else ""

    def _does(self, doing: str, now: float) -> None:
        if doing.partition(" (")[0] != self._doing.partition(" (")[0]:  # a reason differs at every attempt
            self._since = now
        self._doing = doing


class ActorWatch:
    """Asks actors again and again."""

    def __init__(self, addresses: Callable[[], Mapping[str, str]], http: aiohttp.ClientSession) -> None:
        """`addresses`: host:port of each actor's HTTP endpoints now, by its name."""
        self.accounts: dict[str, ActorAccount] = {}
        self._addresses = addresses
        self._http = http

    async def follow(self) -> None:
        """Asks for ever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Asks each actor once."""
        await asyncio.gather(*(self._ask(name, address) for name, address in self._addresses().items()))

    async def _ask(self, name: str, address: str) -> None:
        account = self.accounts.setdefault(name, ActorAccount(time.monotonic()))
        try:
            async with self._http.get(f"http://{address}/status") as answer:
                account.answered(await answer.json(), time.monotonic())
        except TimeoutError:
            account.was_silent(time.monotonic())
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):  # or it is no actor that answers
            account.was_away(time.monotonic())


@contextlib.asynccontextmanager
async def watched_actors(addresses: Callable[[], Mapping[str, str]]) -> AsyncIterator[ActorWatch]:
    """A watch that follows the actors at `addresses`."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_ANSWER_SECONDS)) as http:
        watch = ActorWatch(addresses, http)
        following = asyncio.create_task(watch.follow())
        try:
            yield watch
        finally:
            following.cancel()
            await asyncio.wait([following])
