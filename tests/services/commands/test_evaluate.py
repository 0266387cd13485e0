"""Which episodes an evaluation counts, and when it gives up."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from services.actor.config import ActorConfig
from services.cli import known_settings
from services.commands import evaluate
from services.commands.config import EvalConfig
from services.commands.evaluate import (
    EpisodeShares,
    Played,
    Telling,
    _episodes,
    _players,
    played_returns,
)
from services.inference.config import InferenceConfig
from services.local.process import ChildProcess
from services.local.supervisor import SupervisedService
from shared.bus.episodes import publish_episodes
from shared.bus.streams import ensure_run
from shared.checkpoints import save_checkpoint
from shared.config import load
from shared.errors import RunError, UnsupportedEnvironment
from shared.networks.build import build_network
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.nats import NatsRun


def episode(row: int, value: float) -> dict[str, float]:
    return {"row": row, "return": value}


def test_an_environment_with_short_episodes_does_not_play_the_share_of_the_others() -> None:
    shares = EpisodeShares(episodes=4, environments=2)
    shares.take([episode(0, 1.0), episode(0, 2.0), episode(0, 3.0), episode(1, 4.0)])
    assert [each["return"] for each in shares.episodes] == [1.0, 2.0, 4.0]
    assert not shares.complete
    shares.take([episode(1, 5.0)])
    assert shares.complete


def test_shares_add_up_when_they_do_not_divide() -> None:
    shares = EpisodeShares(episodes=5, environments=3)
    shares.take(episode(row, 0.0) for row in (0, 1, 2) for _ in range(9))
    assert len(shares.episodes) == 5
    assert shares.complete


async def test_no_episode_is_played_twice_and_the_training_limits_no_evaluation(
    nats: NatsRun, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(
        "env: CartPole-v1\nmax_environments: 1\ncuda_graphs: true\nseed: 5\nactor_id: training\n"
    )
    commands = []
    for seed in (None, None, 7, 7):
        config = EvalConfig(run_dir=tmp_path, episodes=30, seed=seed)
        inference, actor = (player.process for player in _players(config, nats.settings, "run", tmp_path))
        commands.append([_loaded(InferenceConfig, inference.command())])
        commands[-1] += [_loaded(ActorConfig, actor.command()) for _ in range(2)]
    for inference, *actors in commands:
        assert inference.max_environments >= actors[0].group_size == 16
        assert not inference.cuda_graphs
        assert actors[0].actor_id != actors[1].actor_id
        assert actors[0].seed == actors[1].seed != 5
    seeds = [actors[0].seed for _, *actors in commands]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [7, 7]


VECTOR = LeafSpec(name="observation", dtype="float32", shape=(4,), low=(-9.0,), high=(9.0,))
SPEC = RunSpec(
    environment=EnvironmentSpec(observation=(VECTOR,), num_actions=2),
    network=NetworkSpec(name="mlp"),
    agent="vtrace",
    unroll=20,
    reward_clip=0.0,
)


def a_run(
    directory: Path, env: str, weights: dict[str, torch.Tensor], *, updates: int = 1, keep: int = 1
) -> EvalConfig:
    """To play a run whose newest checkpoint has these weights."""
    (directory / "config.yaml").write_text(f"env: {env}\n")
    save_checkpoint(
        directory / "checkpoints",
        spec=SPEC,
        weights=weights,
        optimizer_state={},
        counters={"updates": updates},
        rng={},
        keep=keep,
    )
    return EvalConfig(run_dir=directory)


def test_a_checkpoint_whose_network_is_another_now_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"checkpoint-0+1: weights of another network"):
        played_returns(a_run(tmp_path, "CartPole-v1", {"another": torch.ones(1)}), Said().telling)


def test_one_checkpoint_is_played_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path, "CartPole-v1", {"another": torch.ones(1)})
    a_run(tmp_path, "CartPole-v1", build_network(SPEC).state_dict(), updates=2, keep=2)
    checkpoints, older = tmp_path / "checkpoints", "checkpoint-000000000001"

    def is_played(path: Path) -> bool:
        with pytest.raises(RunError, match=f"{older}: weights of another network"):
            played_returns(EvalConfig(run_dir=path), Said().telling)
        return True

    assert is_played(checkpoints / older)
    monkeypatch.chdir(checkpoints)
    assert is_played(Path(older))
    monkeypatch.chdir(older)
    assert is_played(Path("."))
    monkeypatch.chdir(tmp_path)
    checkpoints.rename(tmp_path / "disk")
    checkpoints.symlink_to(tmp_path / "disk")
    assert is_played(checkpoints / older)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunError, match=rf"^{tmp_path} is no run's directory \(config.yaml is missing\)"):
        played_returns(EvalConfig(run_dir=checkpoints / older), Said().telling)


def test_an_environment_that_is_not_found_here_is_named_before_anything_starts(tmp_path: Path) -> None:
    run = a_run(tmp_path, "myenvz:Env-v0", build_network(SPEC).state_dict())
    with pytest.raises(UnsupportedEnvironment, match=r"there is no module 'myenvz' in the working directory"):
        played_returns(run, Said().telling)


def _loaded(model: Any, command: Sequence[str]) -> Any:
    return load(model, command[command.index("services.cli") + 2 :], prog="test", known=known_settings())


class Said(list[str]):
    """What an evaluation says of how far it is, every 0.05 s."""

    @property
    def telling(self) -> Telling:
        return Telling(self.append, 0.05)


def player(code: str, directory: Path) -> SupervisedService:
    command = [sys.executable, "-c", code]
    return SupervisedService(ChildProcess("p", lambda: command, environment={}, log=directory / "log"))


async def test_an_evaluation_whose_player_ends_before_it_ends(nats: NatsRun, tmp_path: Path) -> None:
    config = EvalConfig(run_dir=tmp_path, episodes=3, timeout=60.0)
    async with nats.bus() as bus:
        with pytest.raises(RunError, match="a player ended before all episodes were played"):
            await asyncio.wait_for(_episodes(config, bus, [player("pass", tmp_path)], Said().telling), 20)


async def test_an_evaluation_says_how_far_it_is_and_has_what_ended_when_its_time_is_up(
    nats: NatsRun, tmp_path: Path
) -> None:
    config, said = EvalConfig(run_dir=tmp_path, episodes=3, timeout=8.0), Said()
    async with nats.bus() as bus:
        await ensure_run(bus)
        await publish_episodes(bus, [{"row": 0, "return": 2.0, "length": 5}])
        sleeper = player("import time; time.sleep(60)", tmp_path)
        episodes = await asyncio.wait_for(_episodes(config, bus, [sleeper], said.telling), 20)
    assert [each["return"] for each in episodes] == [2.0]
    assert said[-1] == "1 of 3 episodes have ended"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_ended_in_time_is_printed_before_what_did_not_is_named(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played("checkpoint-7", [2.0, 4.0], missing=28)
    monkeypatch.setattr(evaluate, "played_returns", lambda *_: played)
    config = EvalConfig.model_validate({"run_dir": tmp_path, "timeout": 60.0, "json": as_json})
    with pytest.raises(RunError) as caught:
        evaluate.evaluate(config)
    words = "only 2 of 30 episodes ended in 60 s, 28 are missing; --timeout gives them more time"
    assert (str(caught.value), caught.value.exit_status) == (words, 2)
    printed = capsys.readouterr().out
    if as_json:
        assert orjson.loads(printed)["returns"] == [2.0, 4.0]
    else:
        assert printed == "checkpoint-7: 2 episodes, mean 3.00, median 3.00, deviation 1.00\n"


def test_without_an_episode_there_are_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "played_returns", lambda *_: Played("checkpoint-7", [], missing=30))
    with pytest.raises(RunError, match=r"^only 0 of 30 episodes ended in 3600 s, 30 are missing; --timeout "):
        evaluate.evaluate(EvalConfig(run_dir=tmp_path))
    assert capsys.readouterr().out == ""
