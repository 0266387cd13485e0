"""The NATS server of a local run: started again until it has died too often."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.local import nats
from services.local.config import TrainConfig
from services.local.supervisor import ServiceFailed
from services.nats_server import NatsServer, embedded_nats
from shared.bus.connection import connected_bus
from shared.errors import ConfigurationError, RunError
from tests.support.waiting import eventually


class Servers:
    """Real servers, some of which do not get ready."""

    def __init__(self, *, slow: range, error: Exception | None = None) -> None:
        self._slow = slow
        self._error = error or RunError("nats-server was not ready in 15 s")
        self._starts = 0
        self.running: list[NatsServer] = []

    @contextlib.asynccontextmanager
    async def __call__(self, directory: Path, **settings: Any) -> AsyncIterator[NatsServer]:
        self._starts += 1
        if self._starts in self._slow:
            raise self._error
        async with embedded_nats(directory, **settings) as server:
            self.running.append(server)
            yield server


def config(directory: Path) -> TrainConfig:
    return TrainConfig.model_validate({"env": "CartPole-v1", "run_dir": directory})


@pytest.mark.parametrize(
    "error",
    [
        RunError("nats-server was not ready in 15 s"),
        ConfigurationError("127.0.0.1:4222 is in use, nats-server cannot listen there"),
        OSError(28, "No space left on device"),
    ],
    ids=repr,
)
async def test_a_server_that_does_not_start_again_at_once_does_not_end_the_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(slow=range(2, 3), error=error)
    monkeypatch.setattr(nats, "embedded_nats", servers)
    with capture_logs() as logs:
        async with nats.nats_of_run(config(tmp_path)) as settings:
            servers.running[0].process.kill()
            await eventually(lambda: len(servers.running) == 2, 20)
            async with connected_bus(settings, run_id="run", name="test", patient=False):
                pass
    assert [entry["last_words"] for entry in logs if "died" in entry["event"]][1:] == [str(error)]


async def test_a_server_that_never_starts_again_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(slow=range(2, 100))
    monkeypatch.setattr(nats, "embedded_nats", servers)

    async def run() -> None:
        async with nats.nats_of_run(config(tmp_path)):
            servers.running[0].process.kill()
            await eventually(lambda: False, 60)

    with pytest.raises(ServiceFailed, match="keeps dying: nats-server was not ready") as caught:
        await run()
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(("has_room", "is_removed"), [(True, False), (True, True), (False, False)])
async def test_a_server_that_keeps_nothing_is_started_again_once_its_disk_has_room(
    has_room: bool, is_removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(slow=range(0))
    monkeypatch.setattr(nats, "embedded_nats", servers)
    monkeypatch.setattr(nats, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(nats, "_REFUSES_SECONDS", 0.1)
    if not has_room:
        monkeypatch.setattr(nats, "_ROOM_BYTES", 2**62)
    looks = 0

    def waiting() -> list[str]:
        nonlocal looks
        looks += 1
        return ["NATS to keep chunks (no answer in time)"] if len(servers.running) == 1 else ["actors"]

    async with nats.nats_of_run(config(tmp_path), waiting):
        if is_removed:
            shutil.rmtree(tmp_path / "nats")
        await eventually(lambda: looks > 60 if not has_room else len(servers.running) == 2, 20)
        seen = looks
        await eventually(lambda: looks > seen + 60, 20)
        assert len(servers.running) == (2 if has_room else 1)
        assert servers.running[-1].process.returncode is None


async def test_a_server_that_does_not_start_at_all_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats, "embedded_nats", Servers(slow=range(1, 2)))
    with pytest.raises(RunError, match="not ready"):
        async with nats.nats_of_run(config(tmp_path)):
            pass
