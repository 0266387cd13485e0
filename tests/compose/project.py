"""compose.yaml as a person uses it, in a project of its own; through whichever Compose there is."""

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.addresses import free_port

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180.0


def compose_command() -> list[str] | None:
    """Docker Compose 2, or docker-compose 1.29; None where there is no engine."""
    if shutil.which("docker") is None or _run(["docker", "info"]).returncode:
        return None
    if _run(["docker", "compose", "version"]).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def _run(words: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def docker(*words: str) -> str:
    """What a docker command prints."""
    result = _run(["docker", *words])
    assert result.returncode == 0, (words, result.stderr)
    return result.stdout


class Project:
    """One project: its settings, its containers, their HTTP."""

    def __init__(
        self, compose: list[str], name: str, directory: Path, *, profiles: tuple[str, ...], **settings: str
    ) -> None:
        self.name = name
        self.services = ["nats", "inference", "learner", "actor", *(["replay"] if profiles else [])]
        self.ports = {service: free_port() for service in ("inference", "learner", "replay")}
        first = free_port()
        environment = {
            "SEEDRL_NATS_TOKEN": "1234567890-nats",  # begins like a number, which NATS must not take it for
            "SEEDRL_INFERENCE_TOKEN": "0123-actors-token",
            "SEEDRL_RUN_ID": name,
            "ACTOR_HTTP_PORTS": f"{first}-{first + 15}",
            "BUILD_NETWORK": "host",
            **{f"{service.upper()}_HTTP_PORT": str(port) for service, port in self.ports.items()},
            **settings,
        }
        self.secrets = (environment["SEEDRL_NATS_TOKEN"], environment["SEEDRL_INFERENCE_TOKEN"])
        env_file = directory / "env"
        env_file.write_text("".join(f"{key}={value}\n" for key, value in environment.items()))
        self._compose = [*compose, "--env-file", str(env_file), "-f", str(ROOT / "compose.yaml"), "-p", name]
        for profile in profiles:
            self._compose += ["--profile", profile]
        ours = ("SEEDRL_", "COMPOSE_")
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}

    @property
    def with_ports(self) -> list[str]:
        """The services with one published port each."""
        return [service for service in self.services if service in self.ports]

    def compose(self, *words: str, seconds: float = 900.0) -> str:
        """Runs a compose command; fails unless it succeeds."""
        result = _run([*self._compose, *words], env=self._environment, timeout=seconds, cwd=ROOT)
        assert result.returncode == 0, (words, result.stdout[-3000:], result.stderr[-3000:])
        return result.stdout

    def containers(self, service: str, *, stopped: bool = False) -> list[str]:
        """Ids of a service's containers that run, or of all of them."""
        label = f"label=com.docker.compose.service={service}"
        project = f"label=com.docker.compose.project={self.name}"
        every = ["-a"] if stopped else []
        return sorted(
            docker("ps", "-q", "--no-trunc", *every, "--filter", label, "--filter", project).split()
        )

    def state(self, container: str) -> dict[str, Any]:
        """What the engine says of a container."""
        state: dict[str, Any] = json.loads(docker("inspect", container))[0]
        return state

    def is_healthy(self, container: str) -> bool:
        """Whether the container runs, and its health check says so."""
        state = self.state(container)["State"]
        return bool(state["Running"]) and state.get("Health", {}).get("Status", "healthy") == "healthy"

    def get(self, service: str, path: str) -> str:
        """An endpoint's answer, at the port that is published on this machine."""
        return fetched(self.ports[service], path)

    def status(self, service: str) -> dict[str, Any]:
        """A service's /status."""
        status: dict[str, Any] = json.loads(self.get(service, "status"))
        return status

    def steps(self) -> int:
        """Environment steps that the learner is done with."""
        return int(self.status("learner")["steps"])

    def trains_on(self, *, steps: int = 3000, since: int | None = None) -> None:
        """Waits until the learner has come so much farther than it is, or than `since`."""
        begin = self.patiently(self.steps, "steps") if since is None else since
        self.until(lambda: self.steps() >= begin + steps, f"{steps} steps after {begin}")

    def patiently(self, ask: Callable[[], Any], what: str) -> Any:
        """What `ask` returns, once it does not fail."""
        answers: list[Any] = []
        self.until(lambda: answers.append(ask()) is None, what)
        return answers[-1]

    def until(self, is_so: Callable[[], bool], what: str, *, seconds: float = SECONDS) -> None:
        """Polls until it is so; services that are just starting answer nothing."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, ValueError):
                if is_so():
                    return
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: no {what}\n{self.compose('logs', '--tail', '20')}")
            time.sleep(0.2)


def fetched(port: int, path: str) -> str:
    """What answers there, whatever its status."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return str(error.read().decode())
