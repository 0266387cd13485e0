"""The containers, really run: scaled, killed, replaced and searched for secrets (`make compose-test`)."""

import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.project import Project, compose_command, docker, fetched

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1800)]

GROUPS = 2  # of each actor
BASE = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")
MOST_BYTES = {"actor": 500e6}  # above the base image


@pytest.fixture(params=["vtrace", "r2d2"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Project]:
    compose = compose_command()
    if compose is None:
        pytest.fail(
            "no container engine: docker with Compose 2 or docker-compose 1.29 is needed for these tests"
        )
    is_r2d2 = request.param == "r2d2"
    project = Project(
        compose,
        f"seedrl-test-{secrets.token_hex(3)}",
        tmp_path,
        profiles=("r2d2",) if is_r2d2 else (),
        SEEDRL_PRESET="cartpole_r2d2" if is_r2d2 else "cartpole",
        SEEDRL_ENV="CartPole-v1",
        SEEDRL_TOTAL_STEPS="1000000000",
        SEEDRL_CHECKPOINT_SECONDS="5",
        SEEDRL_SNAPSHOT_SECONDS="5",
        NATS_IMAGE=os.environ.get("NATS_IMAGE", "nats:2-alpine"),
    )
    try:
        yield project
    finally:
        project.compose("down", "--volumes", "--timeout", "30")


def test_a_run_in_containers(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.compose("build")
    with capsys.disabled():
        _print_sizes([service for service in project.services if service != "nats"])
    project.compose("up", "-d")
    _all_healthy(project)
    project.trains_on()

    _scaled(project, 4)
    _endpoints(project)
    _scaled(project, 1)

    assert "updates/s" in project.compose("exec", "-T", "learner", "seedrl", "status")

    for service in project.services:
        _killed(project, service)
    _stopped_while_it_starts(project, "actor")
    for service in ("inference", "learner"):
        _replaced(project, service)

    paths = ("status", "metrics")
    shown = [project.get(service, path) for service in project.with_ports for path in paths]
    _accounts_are_exact(project)
    project.compose("stop", "--timeout", "30")
    for service in project.services:
        for container in project.containers(service, stopped=True):
            state = project.state(container)
            assert state["State"]["ExitCode"] in ((0, 1) if service == "nats" else (0,)), (
                service,
                state["State"],
            )
            shown += [docker("logs", container), json.dumps([state["Path"], state["Args"]])]
    for text in shown:
        assert not any(secret in text for secret in project.secrets)


def _print_sizes(services: list[str]) -> None:
    def size(image: str) -> int:
        return int(docker("image", "inspect", "--format", "{{.Size}}", image))

    print(f"\n{BASE}: {size(BASE) / 1e6:,.0f} MB; above it:")
    for service in services:
        above = size(f"seedrl/{service}:latest") - size(BASE)
        print(f"  {service}: {above / 1e6:,.0f} MB")
        assert above < MOST_BYTES.get(service, 1e11)


def _all_healthy(project: Project) -> None:
    for service in project.services:
        project.until(
            lambda service=service: (
                bool(found := project.containers(service)) and all(map(project.is_healthy, found))
            ),
            f"health of {service}",
        )


def _scaled(project: Project, actors: int) -> None:
    """The number of streams follows that of actors."""
    project.compose("up", "-d", "--no-recreate", "--scale", f"actor={actors}")
    project.until(
        lambda: len(project.status("inference")["streams"]) == GROUPS * actors, f"streams of {actors} actors"
    )
    project.trains_on()


def _endpoints(project: Project) -> None:
    ports = [project.ports[service] for service in project.with_ports]
    for container in project.containers("actor"):
        (published,) = project.state(container)["NetworkSettings"]["Ports"]["8080/tcp"]
        assert published["HostIp"] == "127.0.0.1"
        ports.append(int(published["HostPort"]))
    assert len(set(ports)) == len(project.services) - 2 + 4
    for port in ports:
        assert json.loads(fetched(port, "healthz")) == {"healthy": True, "reasons": []}
        project.until(lambda port=port: json.loads(fetched(port, "readyz"))["ready"], f"readiness at {port}")
        assert "seedrl_" in fetched(port, "metrics")
        assert json.loads(fetched(port, "status"))


def _killed(project: Project, service: str) -> None:
    """Its process is killed, the engine starts it again, training goes on."""
    (container,) = project.containers(service)
    before = project.state(container)
    os.kill(before["State"]["Pid"], signal.SIGKILL)
    project.until(
        lambda: (
            project.state(container)["RestartCount"] > before["RestartCount"]
            and project.is_healthy(container)
        ),
        f"{service} after it was killed",
    )
    project.trains_on()


def _stopped_while_it_starts(project: Project, service: str) -> None:
    """SIGTERM is heeded from the first moment on."""
    (container,) = project.containers(service)
    for seconds in (0.0, 0.5):
        docker("stop", container)
        docker("start", container)
        time.sleep(seconds)
        since = time.monotonic()
        docker("stop", "--time", "60", container)
        assert time.monotonic() - since < 10
        assert project.state(container)["State"]["ExitCode"] in (0, 128 + signal.SIGTERM)
    docker("start", container)
    project.trains_on()


def _replaced(project: Project, service: str) -> None:
    """A new container takes its place; actors stay as they are."""
    actors = _restarts(project)
    (old,) = project.containers(service)
    steps = project.steps()
    project.compose("up", "-d", "--no-deps", "--force-recreate", service)
    project.until(lambda: project.containers(service) not in ([], [old]), f"a new {service}")
    project.trains_on(since=steps)
    assert _restarts(project) == actors


def _restarts(project: Project) -> dict[str, int]:
    """By actor container: how often it was started again."""
    return {actor: project.state(actor)["RestartCount"] for actor in project.containers("actor")}


def _accounts_are_exact(project: Project) -> None:
    """published = trained + refused + queued, once nothing more comes."""
    project.compose("stop", "--timeout", "30", "actor")

    def add_up() -> bool:
        chunks = project.status("learner")["chunks"]
        done = chunks["trained"] + chunks["refused"] + chunks["queued"]
        return bool(chunks["published"] == done and chunks["published"] > 0)

    project.until(add_up, "exact accounts")
    assert project.status("learner")["chunks"]["refused_by_reason"].get("lost", 0) == 0
