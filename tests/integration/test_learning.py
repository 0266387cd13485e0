"""Whole runs that learn: the shortest proof that everything between environment and optimizer is right."""

from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.local_run import assert_exact, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CORRIDOR = (
    *("tests.support.counting_environment:Corridor-v0", "--preset", "cartpole", "--seed", "1"),
    *("--reward-scale", "1", "--entropy-cost", "0.01"),
)


@pytest.mark.parametrize(("lstm_size", "low", "high"), [(32, 0.95, 1.0), (0, 0.3, 0.7)])
def test_only_a_recurrent_policy_remembers_the_cue(
    lstm_size: int, low: float, high: float, tmp_path: Path
) -> None:
    """Best is 1.0, chance 0.5; 100 episodes of chance lie within 0.3 and 0.7 (four deviations)."""
    words = (*CORRIDOR, "--lstm-size", str(lstm_size), "--total-steps", "160000")
    with training(*words, directory=tmp_path / "run", cwd=ROOT) as run:
        run.finish(seconds=240)
    summary = run.summary()
    assert_exact(summary)
    assert low <= summary["mean_return_100"] <= high


def test_a_recurrent_q_network_remembers_the_cue(tmp_path: Path) -> None:
    """The state it was stored with, and what replay does to it on the way, must be right for that."""
    words = (CORRIDOR[0], "--agent", "r2d2", "--seed", "1", "--total-steps", "160000")
    with training(*words, directory=tmp_path / "run", cwd=ROOT) as run:
        run.finish(seconds=600)
    summary = run.summary()
    assert_exact(summary)
    assert summary["eval_return"] >= 0.95


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_r2d2_solves_cartpole_within_half_a_million_steps(seed: int, tmp_path: Path) -> None:
    words = ("CartPole-v1", "--agent", "r2d2", "--seed", str(seed))
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.finish(seconds=1500)
    summary = run.summary()
    assert_exact(summary)
    assert summary["steps"] < 501_000
    assert summary["eval_episodes"] == 30
    assert summary["eval_return"] >= 475


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cartpole_is_solved_within_half_a_million_steps(seed: int, tmp_path: Path) -> None:
    words = ("CartPole-v1", "--preset", "cartpole", "--seed", str(seed))
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.finish(seconds=1500)
    summary = run.summary()
    assert_exact(summary)
    assert summary["steps"] < 501_000
    assert summary["mean_return_100"] >= 475
