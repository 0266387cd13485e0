"""Real NATS servers for tests."""

import os
import shutil
import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from services.nats_server import NatsServer, embedded_nats
from shared.bus.connection import Bus, connected_bus
from shared.config import NatsSettings


@dataclass(frozen=True)
class NatsRun:
    """A run of its own on a server."""

    url: str
    token: str
    run_id: str

    @property
    def settings(self) -> NatsSettings:
        return NatsSettings.model_validate({"nats_url": self.url, "nats_token": self.token})

    def bus(
        self, *, patient: bool = True, name: str = "test", run_id: str | None = None
    ) -> AbstractAsyncContextManager[Bus]:
        """A connection to the run (or to the run `run_id`)."""
        return connected_bus(self.settings, run_id=run_id or self.run_id, name=name, patient=patient)


class OwnNats:
    """A server that a test starts, stops, kills, freezes; always at the same port, in the same directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token = "own-secret"
        self.port = 0
        self._stack = AsyncExitStack()
        self._server: NatsServer | None = None

    @property
    def server(self) -> NatsServer:
        assert self._server is not None
        return self._server

    @property
    def run(self) -> NatsRun:
        return NatsRun(f"nats://127.0.0.1:{self.port}", self.token, "own")

    def bus(
        self, *, patient: bool = True, name: str = "test", run_id: str = "own"
    ) -> AbstractAsyncContextManager[Bus]:
        return self.run.bus(patient=patient, name=name, run_id=run_id)

    async def start(self) -> None:
        self._server = await self._stack.enter_async_context(
            embedded_nats(self.directory, port=self.port, token=self.token)
        )
        self.port = self._server.port

    async def stop(self) -> None:
        """Ends the server as its starter does."""
        self.thaw()
        await self._stack.aclose()

    async def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        await self.server.wait()
        await self._stack.aclose()

    async def lose_store(self) -> None:
        """SIGKILL, and a start with an empty store."""
        await self.kill()
        shutil.rmtree(self.directory)
        await self.start()

    def freeze(self) -> None:
        """The server keeps its connections and does nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._server is not None and self._server.process.returncode is None:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self.server.process.pid, number)
