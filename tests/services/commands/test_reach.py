"""How `seedrl status` and `seedrl control` find the run that is meant."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.commands import reach
from services.commands.config import StatusConfig
from services.commands.reach import reached_run
from services.local.config import TrainConfig
from services.local.connection import Connection, published_connection
from services.local.directory import used_directory
from shared.errors import ConnectionFailed, RunError
from tests.support.nats import NatsRun


@pytest.fixture
def run_dir(nats: NatsRun, tmp_path: Path) -> Iterator[Path]:
    """The directory of a run that goes on."""
    config = TrainConfig.model_validate({"env": "CartPole-v1", "run_dir": tmp_path})
    connection = Connection("127.0.0.1:1", nats.token, nats.url, 3, nats.run_id)
    with used_directory(config), published_connection(tmp_path, connection):
        yield tmp_path


async def run_id(**settings: object) -> str:
    async with reached_run(StatusConfig.model_validate(settings), name="test") as bus:
        return bus.run_id


async def test_a_directory_is_enough(run_dir: Path, nats: NatsRun) -> None:
    assert await run_id(run_dir=run_dir) == nats.run_id
    assert await run_id(run_dir=run_dir, run_id=nats.run_id, nats_url=nats.url) == nats.run_id


@pytest.mark.parametrize("setting", [{"run_id": "other"}, {"nats_url": "nats://elsewhere:4222"}])
async def test_a_directory_and_another_run_are_refused(run_dir: Path, setting: dict[str, str]) -> None:
    with pytest.raises(RunError, match=f"{run_dir} and {next(iter(setting))} name different runs"):
        await run_id(run_dir=run_dir, **setting)


async def test_who_names_nothing_is_told_of_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def unreachable(*_: object, **__: object) -> AsyncIterator[None]:
        raise ConnectionFailed("no NATS server")
        yield

    monkeypatch.setattr(reach, "connected_bus", unreachable)
    with pytest.raises(ConnectionFailed, match=r"^no NATS server; for a local run, give its directory$"):
        await run_id()
    with pytest.raises(ConnectionFailed, match=r"^no NATS server$"):
        await run_id(nats_url="nats://here:4222")
