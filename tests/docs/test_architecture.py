"""What docs/architecture.md shows is true: its layers, and the services started one by one."""

import re
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from shared.addresses import free_port
from tests.support.commands import ROOT, command, environment, seedrl

DOCUMENT = (ROOT / "docs/architecture.md").read_text()


def section(title: str) -> list[str]:
    """The lines of the first code block below a heading."""
    found = re.search(rf"^## {title}\n.*?^```\w*\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1].splitlines()


def test_the_layers_are_those_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    checked = project["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [re.split(r"\s{2,}", line)[0] for line in section("Layers")] == checked


@pytest.mark.timeout(180)
def test_the_services_can_be_started_one_by_one(tmp_path: Path) -> None:
    *services, status, stop = [line.split() for line in section("Starting the services one by one")]
    nats, port = str(free_port()), str(free_port())
    settings = {
        "SEEDRL_NATS_URL": f"nats://127.0.0.1:{nats}",
        "SEEDRL_PORT": port,
        "SEEDRL_INFERENCE_URL": f"127.0.0.1:{port}",
    }
    with ExitStack() as stack:
        started = [stack.enter_context(background(words, nats, settings, tmp_path)) for words in services]
        for each in started:
            stack.callback(each.kill)
        until_steps(1000, tmp_path / "runs/pole/accounts.json")
        said = seedrl(*status[1:], cwd=tmp_path, settings=settings)
        assert said.returncode == 0, said.stderr
        assert all(service in said.stdout for service in ("actor", "inference", "learner"))
        assert seedrl(*stop[1:], cwd=tmp_path, settings=settings).returncode == 0
        assert [each.wait(30) for each in started[1:]] == [0, 0, 0]


def background(words: list[str], nats: str, settings: dict[str, str], cwd: Path) -> "subprocess.Popen[bytes]":
    """A command of the document, with a free port for the usual one."""
    words = [nats if word == "4222" else word for word in words]
    server = str(Path(sys.executable).with_name("nats-server"))
    whole = [server, *words[1:]] if words[0] == "nats-server" else command(*words[1:])
    return subprocess.Popen(
        whole, cwd=cwd, env=environment(**settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def until_steps(steps: int, accounts: Path, *, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not accounts.exists() or orjson.loads(accounts.read_bytes())["steps"] < steps:
        assert time.monotonic() < deadline, f"no {steps} steps in {seconds} s"
        time.sleep(0.05)  # polls a file; nothing to await
