"""Whoever is made slow in a real run is named as its bottleneck."""

import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.support.commands import command, environment, seedrl
from tests.support.local_run import LocalRun, training

ENDLESS = ("--total-steps", "1000000000")
CARTPOLE = ("CartPole-v1", "--preset", "cartpole", *ENDLESS)
SLOW = ("tests.support.actor_environments:Slow-v0", "--env-kwargs", '{"seconds": 0.005}', *ENDLESS)
R2D2 = ("--agent", "r2d2", "--eval-episodes", "0", "--min-replay-size", "50")
ACTORS = "actors: inference waits for their observations; more actors would help"
LEARNER = "learner: (it works all the time|inference is held back)"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def status(run: LocalRun, service: str) -> dict[str, Any]:
    """What the service says at /status; empty while it does not answer."""
    address = run.http_addresses().get(service)
    try:
        with urllib.request.urlopen(f"http://{address}/status", timeout=10) as answer:
            return dict(orjson.loads(answer.read()))
    except OSError:
        return {}


def until_it_is(words: str, run: LocalRun) -> None:
    """Waits until the learner's words for the bottleneck match."""
    said: list[str] = [""]

    def matches() -> bool:
        said.append(status(run, "learner").get("bottleneck", said[-1]))
        return re.match(words, said[-1]) is not None

    try:
        run.until(matches, seconds=90)
    except AssertionError:
        raise AssertionError(f"never {words!r}, but {set(said)}") from None


def assert_shares(run: LocalRun, *services: str) -> None:
    for service in services:
        shares = status(run, service)["activity"]
        assert shares.keys() == {"work", "input", "output"}
        assert sum(shares.values()) == pytest.approx(1, abs=0.01), (service, shares)


def test_slow_environments(tmp_path: Path) -> None:
    with training(*SLOW, "--preset", "cartpole", directory=tmp_path / "run", cwd=tmp_path) as run:
        until_it_is(ACTORS, run)
        assert_shares(run, "actor-0", "inference", "learner")
        run.until(lambda: status(run, "actor-0")["activity"]["work"] > 0.8)
        said = seedrl("status", run.directory, cwd=tmp_path).stdout
        assert re.search(r"^bottleneck: actors: inference waits for", said, re.MULTILINE), said
        run.until_said("bottleneck: actors")
        run.end()


def test_a_slow_learner(tmp_path: Path) -> None:
    slow = ("--sample-reuse", "60", "--batch-size", "16")
    with training(*CARTPOLE, *slow, directory=tmp_path / "run", cwd=tmp_path) as run:
        until_it_is(LEARNER, run)
        run.until(lambda: status(run, "inference")["activity"]["output"] > 0.5)
        run.end()


def test_a_large_network_in_inference(tmp_path: Path) -> None:
    """Hundreds of environments are acted for and not trained on, beside the few that are."""
    large = ("--hidden-sizes", "[2048, 2048]", "--group-size", "2", "--batch-size", "2")
    with training(*CARTPOLE, *large, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until(lambda: bool(run.connection()))
        reach = run.connection()
        where = ("--inference-url", reach["inference_url"], "--run-id", reach["run_id"])
        guest = subprocess.Popen(
            command("actor", "CartPole-v1", *where, "--groups", "3", "--group-size", "256", "--role", "eval"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until_it_is("inference: the model works all the time", run)
        finally:
            guest.terminate()
            guest.wait(30)
        run.end()


def test_what_is_missing_comes_first(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(1000)
        assert seedrl("control", "pause", run.directory, cwd=tmp_path).returncode == 0
        until_it_is("paused: inference withholds all actions", run)
        assert seedrl("control", "resume", run.directory, cwd=tmp_path).returncode == 0
        until_it_is(r"\w+: ", run)

        inference = run.pid("inference")
        os.kill(inference, signal.SIGSTOP)
        until_it_is("no inference service says anything", run)
        os.kill(inference, signal.SIGCONT)
        until_it_is(r"\w+: ", run)

        actor = run.pid("actor")
        os.kill(actor, signal.SIGSTOP)  # its streams are still there
        until_it_is(ACTORS, run)
        os.kill(actor, signal.SIGCONT)
        run.end()


def test_a_slow_learner_with_replay(tmp_path: Path) -> None:
    words = ("CartPole-v1", *R2D2, *ENDLESS, "--replay-ratio", "60")
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        until_it_is(LEARNER, run)
        assert_shares(run, "actor-0", "inference", "replay", "learner")
        run.end()


def test_slow_environments_with_replay(tmp_path: Path) -> None:
    with training(*SLOW, *R2D2, directory=tmp_path / "run", cwd=tmp_path) as run:
        until_it_is(ACTORS, run)
        run.end()
