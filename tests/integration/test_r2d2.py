"""`seedrl train --agent r2d2` as a user sees it: replay among the services, killed in parts, resumed."""

import os
import signal
from pathlib import Path
from typing import Any

import orjson
import pytest

from shared.checkpoints import latest_checkpoint
from tests.support.local_run import LocalRun, assert_exact, training

SMALL = ["CartPole-v1", "--agent", "r2d2", "--min-replay-size", "20", "--checkpoint-seconds", "2"]

pytestmark = pytest.mark.timeout(300)


def updates(run: LocalRun) -> int:
    return int(run.accounts().get("updates", 0))


def test_a_run_ends_with_its_steps_and_says_what_the_policy_is_worth(tmp_path: Path) -> None:
    words = (*SMALL, "--total-steps", "4000", "--eval-episodes", "4")
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.finish(seconds=200)
    summary = run.summary()
    assert summary["exit_reason"] == "total steps reached"
    assert summary["steps"] >= 4000
    assert_exact(summary)
    assert summary["eval_episodes"] == 4
    assert 1 <= summary["eval_return"] <= 500
    assert summary["sequences"] == 16 * summary["updates"] > 0
    assert 0 < summary["samples_per_insert"] < 7  # the preset's replay_ratio is 6
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.optimizer["target_network"].keys() == checkpoint.weights.keys()
    assert (tmp_path / "run" / "logs" / "replay.log").stat().st_size > 0


@pytest.mark.slow
def test_learner_and_replay_may_be_killed_and_the_run_resumed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*SMALL, "--eval-episodes", "0", directory=directory, cwd=tmp_path) as run:
        run.until(lambda: updates(run) >= 20)
        for service in ("replay", "learner", "replay"):
            before = updates(run)
            os.kill(run.pid(service), signal.SIGKILL)
            run.until(lambda before=before: updates(run) >= before + 10)  # type: ignore[misc]
        run.end()
    first = run.summary()
    assert first["exit_reason"] == "interrupted"
    assert first["eval_return"] is None
    assert_exact(first)
    words = ("CartPole-v1", "--resume", "--total-steps", str(first["steps"] + 1000))
    with training(*words, directory=directory, cwd=tmp_path) as run:
        run.finish(seconds=200)
    second = run.summary()
    assert second["steps"] >= first["steps"] + 1000
    assert second["updates"] > first["updates"]
    assert second["sequences"] > first["sequences"]
    assert_exact(second)


@pytest.mark.slow
def test_with_replay_and_learner_killed_both_are_restored_and_the_run_ends_by_itself(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = (*SMALL[:-1], "1", "--total-steps", "24000", "--eval-episodes", "0")
    with training(*words, directory=directory, cwd=tmp_path) as run:
        for service in ("replay", "learner", "replay"):
            saved = newest_snapshot(directory)
            run.until(lambda saved=saved: newest_snapshot(directory) > saved)  # type: ignore[misc]
            before, killed = updates(run), run.pid(service)
            os.kill(killed, signal.SIGKILL)
            run.until(lambda before=before: updates(run) >= before + 10)  # type: ignore[misc]
            assert run.pid(service) != killed
        run.finish(seconds=200)
    summary = run.summary()
    assert summary["exit_reason"] == "total steps reached"
    assert summary["steps"] >= 24000
    assert_exact(summary)
    chunks = summary["chunks"]
    assert chunks["refused_by_reason"] == dict.fromkeys(chunks["refused_by_reason"], 0)
    assert chunks["rolled_back"] < chunks["trained"] / 2
    sequences, checkpoint = restored(run, "replay"), restored(run, "learner")
    assert [each["items"] > 0 for each in sequences] == [True, True]
    assert [each["updates"] > 0 for each in checkpoint] == [True]


def restored(run: LocalRun, service: str) -> list[dict[str, Any]]:
    """What each life of a service said of what it found on the disk."""
    lines = (run.directory / "logs" / f"{service}.log").read_text().splitlines()
    return [orjson.loads(line) for line in lines if '"event":"restored"' in line]


def newest_snapshot(directory: Path) -> str:
    """The name of the newest snapshot of replay; "" before there is one."""
    return max((path.name for path in directory.glob("replay/snapshot-*")), default="")
