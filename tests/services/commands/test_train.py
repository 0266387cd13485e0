"""What `seedrl train` says, and where nobody can read it."""

import io
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from services.commands import evaluate
from services.commands.evaluate import Played
from services.commands.output import Output
from services.commands.showing import SILENT_SECONDS, joining, statuses_of
from services.commands.train import BUILT_IN, _evaluated, _tell
from services.local.config import TrainConfig
from services.local.process import ChildProcess
from services.local.supervisor import SupervisedService
from shared.bus.statuses import StatusBoard
from shared.networks.build import AVAILABLE

SUMMARY = {
    "exit_reason": "total steps reached",
    "steps": 1200,
    "seconds": 3.0,
    "steps_per_second": 400.0,
    "updates": 4,
    "episodes": 9,
    "mean_return_100": 1.5,
}


def told(directory: Path, **summary: Any) -> str:
    """What `seedrl train` says at its end."""
    console = Console(file=io.StringIO())
    _tell(console, directory, {**SUMMARY, **summary})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_service_that_was_just_started_has_not_fallen_silent(tmp_path: Path) -> None:
    process = ChildProcess("learner", lambda: ["true"], environment={}, log=tmp_path / "log")
    learner = SupervisedService(process)
    learner.state = "running"
    run: Any = SimpleNamespace(services={"learner": learner})
    board = StatusBoard()
    assert statuses_of(run, board, now=1e6) == {"learner": {}}
    board.note("learner", "l", {"steps": 1})
    seen = board.newest("learner")["seen"]
    assert statuses_of(run, board, now=seen)["learner"]["steps"] == 1
    silent = statuses_of(run, board, now=seen + SILENT_SECONDS + 1)
    assert silent == {"learner": {"silent_seconds": SILENT_SECONDS + 1}}
    learner.died_at = seen
    assert statuses_of(run, board, now=seen + SILENT_SECONDS + 1) == {"learner": {}}


def test_what_is_shown_to_be_typed_goes_through_a_shell(tmp_path: Path) -> None:
    directory = tmp_path / "sp ace é" / "run 1"
    (directory / "checkpoints").mkdir(parents=True)
    assert [shlex.split(each) for each in re.findall(r"(?:tensorboard|seedrl) [^)\n]*", told(directory))] == [
        ["tensorboard", "--logdir", str(directory / "tensorboard")],
        ["seedrl", "eval", str(directory)],
    ]
    config = SimpleNamespace(directory=directory, env="CartPole-v1", tls_ca=None)
    run: Any = SimpleNamespace(config=config, inference_url="[::1]:5", outer_inference_url=None)
    (line,) = joining(run)
    preset = shlex.quote(str(directory / "config.yaml"))
    assert line == f"another actor: seedrl actor CartPole-v1 --preset {preset} --inference-url '[::1]:5'"


def test_where_nothing_was_trained_nothing_is_offered(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()  # the learner has saved what it would begin with
    said = told(tmp_path, exit_reason="interrupted", updates=0, mean_return_100=None)
    assert f"nothing was trained; logs: {tmp_path / 'logs'}" in said
    assert "seedrl eval" not in said
    assert "tensorboard" not in said


def evaluated(directory: Path, played: Played, **summary: Any) -> tuple[dict[str, Any], str]:
    """The summary after an evaluation, and what was said of it."""
    console = Console(file=io.StringIO())
    config = TrainConfig.model_validate({"env": "CartPole-v1", "agent": "r2d2", "run_dir": directory})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "played_returns", lambda *_: played)
        result = _evaluated(config, console, {**SUMMARY, "eval_return": None, "eval_episodes": 0, **summary})
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_the_evaluation_of_a_training_is_of_all_episodes_or_none(tmp_path: Path) -> None:
    summary, _ = evaluated(tmp_path, Played("checkpoint-7", [2.0, 4.0], missing=0))
    assert (summary["eval_return"], summary["eval_episodes"]) == (3.0, 2)
    summary, said = evaluated(tmp_path, Played("checkpoint-7", [2.0, 4.0], missing=28))
    assert (summary["eval_return"], summary["eval_episodes"]) == (None, 0)
    assert f"only 2 of 30 episodes ended in 3600 s, 28 are missing; seedrl eval {tmp_path} --timeout" in said


def test_a_training_without_the_end_of_an_episode_is_not_evaluated(tmp_path: Path) -> None:
    summary, said = evaluated(tmp_path, Played("checkpoint-7", [2.0], missing=0), episodes=0)
    assert (summary["eval_return"], summary["eval_episodes"]) == (None, 0)
    assert said.startswith("no evaluation: no episode ended in the training")


def test_names_of_networks_that_are_taken_unseen_are_names_of_networks() -> None:
    assert {"auto", *AVAILABLE} == BUILT_IN


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def closed_terminal() -> int:
    ours, theirs = os.openpty()
    os.close(ours)
    return theirs


@pytest.mark.parametrize("output", [full_disk, closed_pipe, closed_terminal])
def test_what_cannot_be_shown_ends_nothing(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(output(), "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        silent: Any = Output()
        console = Console(file=silent, force_terminal=True)
        with Live(console=console) as live:
            live.update("steps")
        console.print("stopping")
