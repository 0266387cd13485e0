import subprocess
import sys

import orjson
import pytest

from tests.support.commands import ROOT, environment

SMALL = (
    "--group-size",
    "8",
    "--unroll",
    "4",
    "--batch-size",
    "4",
    "--windows",
    "3",
    "--stage-seconds",
    "0.3",
)


def agreement(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.agreement", "--preset", "atari_vtrace", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.slow
def test_both_measure_every_stage() -> None:
    result = agreement(*SMALL)
    assert result.returncode == 0, result.stderr
    figures = orjson.loads(result.stdout)
    assert list(figures) == ["env", "inference", "learner"]
    for stage in figures.values():
        # Noise may have any size in so short a time; another unit or number of steps would be far from this.
        assert stage["ratio"] == pytest.approx(1, rel=0.6)
        assert stage["bench"] / stage["ingredients"] == pytest.approx(1, rel=0.6)


def test_its_help_tells_of_itself() -> None:
    result = agreement("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python -m benchmarks.agreement [OPTIONS]\n\nMeasures how far")
    assert "--windows int Rounds; " in " ".join(result.stdout.split())
    assert "--warm-up-seconds" not in result.stdout


def test_an_option_of_the_pipeline_is_refused() -> None:
    result = agreement("--window-seconds", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--window-seconds is not for" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("other", [("--env", "CartPole-v1"), ("--agent", "r2d2"), ("--lstm-size", "8")])
def test_what_ingredients_does_not_know_is_refused(other: tuple[str, str]) -> None:
    result = agreement(*other)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "agreement: ingredients.py knows ALE/Pong-v5 and V-trace without an LSTM alone\n"
    )
