"""How each service of a run is told what to do."""

import asyncio
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from services.learner.accounts import Accounts
from services.local.config import TrainConfig
from services.local.run import LocalRun
from services.local.supervisor import ServiceFailed
from shared.accounts import write_accounts
from shared.config import NatsSettings
from shared.errors import ConfigurationError

NATS = NatsSettings.model_validate({"nats_url": "nats://127.0.0.1:1", "nats_token": "hush"})


def local_run(directory: Path, **settings: object) -> LocalRun:
    config = TrainConfig.model_validate({"env": "CartPole-v1", "run_dir": directory, **settings})
    return LocalRun(config, NATS)


def words(run: LocalRun, service: str) -> str:
    return " ".join(run.services[service].process.command())


def test_there_are_inference_a_learner_and_as_many_actors_as_wanted(tmp_path: Path) -> None:
    assert list(local_run(tmp_path, actors=2).services) == ["inference", "learner", "actor-0", "actor-1"]


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1:"), ("::", "[::1]:")])
def test_where_an_actor_answers_http_is_known_at_each_of_its_starts(
    host: str, reached: str, tmp_path: Path
) -> None:
    run = local_run(tmp_path, actors=2, http_host=host)
    assert run.actor_addresses == {}
    addresses = set()
    for name in ("actor-0", "actor-1", "actor-0"):
        port = words(run, name).rpartition(" --http-port ")[2]
        assert run.actor_addresses[name] == f"{reached}{port}"
        addresses.add(run.actor_addresses[name])
    assert len(addresses) == 3


def test_an_r2d2_run_has_a_replay_in_the_same_directory_as_its_learner(tmp_path: Path) -> None:
    run = local_run(tmp_path, agent="r2d2", optimizer="adam")
    assert list(run.services) == ["inference", "replay", "learner", "actor-0"]
    for service in ("replay", "learner"):
        assert f"--run-dir {tmp_path}" in words(run, service)


def test_every_service_answers_http_where_the_run_says(tmp_path: Path) -> None:
    run = local_run(tmp_path, http_host="0.0.0.0")
    assert all("--http-host 0.0.0.0" in words(run, service) for service in run.services)


async def test_services_end_in_the_order_in_which_they_need_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = local_run(tmp_path, agent="r2d2", optimizer="adam")
    ended = []
    for name, service in run.services.items():

        async def end(*, grace_seconds: float, name: str = name) -> None:
            ended.append(name)

        monkeypatch.setattr(service, "end", end)
    assert await run._end() is None
    assert ended == ["actor-0", "inference", "learner", "replay"]


@pytest.mark.parametrize(
    ("failing", "status", "checkpoint", "is_lost"),
    [
        ("learner", 1, 90, True),
        ("learner", 1, 100, False),
        ("learner", 2, 100, True),
        ("replay", 1, 100, True),
        ("inference", 1, 90, False),
    ],
)
async def test_a_run_fails_whose_learner_or_replay_cannot_save_what_it_has(
    failing: str,
    status: int,
    checkpoint: int,
    is_lost: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = local_run(tmp_path, agent="r2d2", optimizer="adam")
    write_accounts(tmp_path, Accounts(updates=100).to_json())
    for update in (7, checkpoint):
        (tmp_path / f"checkpoints/checkpoint-{update:012d}").mkdir(parents=True)
    for name, service in run.services.items():
        is_over = asyncio.Event()

        async def end(
            *, grace_seconds: float, name: str = name, is_over: asyncio.Event = is_over
        ) -> ServiceFailed | None:
            is_over.set()
            return ServiceFailed(f"{name}: it failed", status) if name == failing else None

        monkeypatch.setattr(service, "run_until_done", is_over.wait)
        monkeypatch.setattr(service, "end", end)
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(ServiceFailed, match="it failed") if is_lost else nullcontext():
        async with asyncio.timeout(5):
            assert not await run.until_done(stop)


async def test_replay_is_ended_also_where_nobody_can_tell_what_the_learner_had_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = local_run(tmp_path, agent="r2d2", optimizer="adam")
    (tmp_path / "accounts.json").write_text("no journal")
    ended = []
    for name, service in run.services.items():

        async def end(*, grace_seconds: float, name: str = name) -> ServiceFailed | None:
            ended.append(name)
            return ServiceFailed("learner: it was killed", 1) if name == "learner" else None

        monkeypatch.setattr(service, "end", end)
    assert str(await run._end()) == "learner: it was killed"
    assert ended[-1] == "replay"


def test_services_meet_at_one_address_and_no_command_line_shows_the_token(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    host, _, port = run.inference_url.rpartition(":")
    assert f"--host {host} --port {port}" in words(run, "inference")
    assert f"--inference-url {run.inference_url}" in words(run, "actor-0")
    assert not any("hush" in words(run, service) for service in run.services)
    assert run.connection.nats_token == "hush"


@pytest.mark.parametrize(
    ("host", "reached"), [("0.0.0.0", "127.0.0.1:"), ("::", "127.0.0.1:"), ("::1", "[::1]:")]
)
def test_actors_reach_inference_wherever_it_listens(host: str, reached: str, tmp_path: Path) -> None:
    run = local_run(tmp_path, host=host)
    assert run.inference_url.startswith(reached)
    assert f"--host {host} " in words(run, "inference")


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
            local_run(tmp_path, port=port)


def test_a_learner_that_is_started_again_resumes(tmp_path: Path) -> None:
    run = local_run(tmp_path)
    assert "--resume" not in words(run, "learner")
    write_accounts(tmp_path, Accounts().to_json())
    assert "--resume" in words(run, "learner")
