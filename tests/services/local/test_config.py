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


def test_what_is_written_down_is_a_preset_for_every_service_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SEEDRL_NATS_TOKEN", "hush")
    monkeypatch.setenv("SEEDRL_INFERENCE_TOKEN", "hush")
    write("CartPole-v1", "--run-dir", "x", "--nats-url", "nats://h:1", "--seed", "3")
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


def test_r2d2_has_a_preset_unless_one_is_given(tmp_path: Path) -> None:
    cartpole = loaded("CartPole-v1", "--agent", "r2d2")
    assert (cartpole.agent, cartpole.network, cartpole.optimizer) == ("r2d2", "mlp", "adam")
    pong = loaded("ALE/Pong-v5", "--agent", "r2d2")
    assert (pong.agent, pong.network, pong.lstm_size) == ("r2d2", "impala_shallow", 256)
    Path("mine.yaml").write_text(yaml.safe_dump({"agent": "r2d2", "network": "nature"}))
    assert loaded("ALE/Pong-v5", "--preset", "mine.yaml").lstm_size == 0


def test_the_atari_preset_of_r2d2_has_the_values_of_the_paper() -> None:
    config = loaded("ALE/Pong-v5", "--preset", "atari_r2d2")
    assert (config.batch_size, config.sequence_length, config.burn_in, config.n_steps) == (64, 80, 40, 5)
    assert (config.discount, config.optimizer, config.learning_rate) == (0.997, "adam", 1e-4)
    assert (config.adam_epsilon, config.max_gradient_norm) == (1e-3, 80.0)
    assert (config.replay_capacity, config.min_replay_size, config.replay_ratio) == (100_000, 5000, 0.75)
    assert (config.priority_exponent, config.importance_exponent, config.priority_eta) == (0.9, 0.6, 0.9)
    assert (config.target_update_period, config.frame_stack, config.reward_clip) == (2500, 4, 0.0)
    assert config.actors * config.groups * config.group_size == 610
    assert (config.network, config.lstm_size, config.dueling_size) == ("nature", 512, 512)
    assert (config.env_kwargs, config.life_loss) == ({"full_action_space": True}, False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sequence-length", "30"), r"sequence_length \(30\) must be a multiple of unroll \(20\)"),
        (("--reward-scale", "0.1"), r"reward_scale is for V-trace: with agent r2d2 it must be 1, not 0.1"),
        (("--minibatches", "2"), r"minibatches is for V-trace"),
        (("--burn-in=-1",), r"--burn-in: "),
        (("--replay-ratio", "0"), r"--replay-ratio: "),
        (("--importance-exponent", "2"), r"--importance-exponent: "),
    ],
)
def test_settings_that_do_not_fit_r2d2_are_refused_in_one_line(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        loaded("CartPole-v1", "--agent", "r2d2", *words)
    assert "\n" not in str(caught.value)
