"""Configuration of `seedrl train`: run id and directory, resuming, what is written down."""

from pathlib import Path

import pytest
import yaml

from services.actor.config import ActorConfig
from services.inference.config import InferenceConfig
from services.learner.config import LearnerConfig
from services.local.config import CONFIG_FILE, TrainConfig, saved_env, write_config
from shared.config import load
from shared.errors import ConfigurationError, RunError
from shared.subjects import validated_run_id


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(*words: str) -> TrainConfig:
    return TrainConfig.loaded(words, prog="seedrl train", known=())


def test_a_run_is_called_after_its_directory() -> None:
    config = loaded("CartPole-v1", "--run-dir", "runs/my run")
    assert config.directory == Path("runs/my run")
    assert config.run_id.startswith("my-run-")
    assert validated_run_id(config.run_id)


def test_runs_of_the_same_directory_name_have_different_ids() -> None:
    first, second = (loaded("CartPole-v1", "--run-dir", "x") for _ in range(2))
    assert first.run_id != second.run_id


@pytest.mark.parametrize("name", ["mine", "default"])
def test_a_given_run_id_is_kept_and_the_run_still_has_a_directory(name: str) -> None:
    config = loaded("CartPole-v1", "--run-id", name)
    assert config.run_id == name
    assert config.directory.parent == Path("runs")
    assert config.directory.name.startswith("cartpole-v1-")


def test_resuming_wants_a_directory_that_holds_a_run() -> None:
    with pytest.raises(ConfigurationError, match="--resume wants --run-dir"):
        loaded("CartPole-v1", "--resume")
    with pytest.raises(RunError, match="holds no run"):
        loaded("CartPole-v1", "--resume", "--run-dir", "x")
    with pytest.raises(RunError, match="no --preset"):
        loaded("CartPole-v1", "--resume", "--run-dir", "x", "--preset", "cartpole")


def write(*words: str) -> None:
    config = loaded(*words)
    config.directory.mkdir()
    write_config(config, config.directory / CONFIG_FILE)


def test_a_resumed_run_has_its_own_configuration_and_options_win_over_it() -> None:
    write("CartPole-v1", "--preset", "cartpole", "--run-dir", "x", "--run-id", "mine", "--total-steps", "7")
    resumed = loaded("CartPole-v1", "--resume", "--run-dir", "x", "--total-steps", "9")
    assert (resumed.run_id, resumed.optimizer, resumed.total_steps) == ("mine", "adam", 9)
    with pytest.raises(RunError, match="its environment is CartPole-v1"):
        loaded("Acrobot-v1", "--resume", "--run-dir", "x")


def test_what_is_written_down_is_a_preset_for_every_service_without_secrets() -> None:
    write("CartPole-v1", "--run-dir", "x", "--nats-url", "nats://h:1", "--nats-token", "hush", "--seed", "3")
    assert "hush" not in Path("x", CONFIG_FILE).read_text()
    known = (TrainConfig, ActorConfig, InferenceConfig, LearnerConfig)
    for model in (InferenceConfig, LearnerConfig):
        assert load(model, ["--preset", f"x/{CONFIG_FILE}"], prog="x", known=known).seed == 3
    assert saved_env(Path("x")) == "CartPole-v1"


@pytest.mark.parametrize("text", ["env: [", "seed: 1", "- a", "\x00", ""])
def test_a_damaged_configuration_is_named(text: str) -> None:
    Path("x").mkdir()
    Path("x", CONFIG_FILE).write_text(text)
    with pytest.raises(RunError, match=r"x/config.yaml is damaged: "):
        saved_env(Path("x"))


def test_atari_has_a_preset_unless_one_is_given(tmp_path: Path) -> None:
    assert loaded("ALE/Pong-v5").network == "impala_shallow"
    Path("mine.yaml").write_text(yaml.safe_dump({"network": "nature"}))
    assert loaded("ALE/Pong-v5", "--preset", "mine.yaml").network == "nature"
