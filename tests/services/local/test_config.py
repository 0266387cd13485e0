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
from shared.presets import preset_names
from shared.subjects import validated_run_id
from tests.support.certificates import made_certificates


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


def test_a_directory_that_begins_with_a_dash_is_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert TrainConfig(env="CartPole-v1", run_dir=Path("-odd")).directory == tmp_path / "-odd"


def test_runs_of_the_same_directory_name_have_different_ids() -> None:
    first, second = (loaded("CartPole-v1", "--run-dir", "x") for _ in range(2))
    assert first.run_id != second.run_id


def test_the_configuration_of_a_run_makes_another_run_as_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "first" / CONFIG_FILE
    path.parent.mkdir()
    write_config(loaded("CartPole-v1", "--run-dir", str(path.parent), "--unroll", "7"), path)
    (path.parent / "lock").touch()
    second = loaded("CartPole-v1", "--preset", str(path), "--run-dir", "second")
    assert second.unroll == 7
    assert second.run_id.startswith("second-")
    named = loaded("CartPole-v1", "--preset", str(path), "--run-dir", "second", "--run-id", "mine")
    assert named.run_id == "mine"
    above = tmp_path / "above.yaml"
    above.write_text("preset: first/config.yaml\nunroll: 8")
    assert loaded("CartPole-v1", "--preset", str(above), "--run-dir", "third").run_id.startswith("third-")
    own = tmp_path / CONFIG_FILE
    own.write_text("run_id: chosen")
    assert loaded("CartPole-v1", "--preset", str(own)).run_id == "chosen"


@pytest.mark.parametrize("said", ["run_dir: x", "run_dir: x\nresume: true"])
def test_a_preset_can_not_make_a_run_go_on_with_other_settings(said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(said)
    with pytest.raises(RunError, match="--resume wants no --preset"):
        loaded("CartPole-v1", "--preset", str(path), *(() if "resume" in said else ("--resume",)))


@pytest.mark.parametrize("said", ["false", "0"])
def test_the_environment_may_say_that_nothing_is_resumed(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_RESUME", said)
    assert not loaded("CartPole-v1").resume


def test_runs_that_begin_in_the_same_second_have_different_directories() -> None:
    assert len({loaded("CartPole-v1").directory for _ in range(3)}) == 3


@pytest.mark.parametrize("name", ["mine", "default"])
def test_a_given_run_id_is_kept_and_the_run_still_has_a_directory(name: str) -> None:
    config = loaded("CartPole-v1", "--run-id", name)
    assert config.run_id == name
    assert config.directory.parent == Path("runs")
    assert config.directory.name.startswith("cartpole-v1-")


def test_an_environment_is_named_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^ENV must be given \(see seedrl train --help\)$"):
        loaded("--seed", "1")
    monkeypatch.setenv("SEEDRL_ENV", "CartPole-v1")
    assert loaded("--seed", "1").env == "CartPole-v1"
    assert loaded("Acrobot-v1").env == "Acrobot-v1"


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
    resumed = loaded("--resume", "--run-dir", "x", "--total-steps", "9")
    assert resumed.env == "CartPole-v1"
    assert (resumed.run_id, resumed.optimizer, resumed.total_steps) == ("mine", "adam", 9)
    with pytest.raises(RunError, match="its environment is CartPole-v1"):
        loaded("Acrobot-v1", "--resume", "--run-dir", "x")


def test_options_of_a_resumed_run_are_judged_beside_its_own_configuration() -> None:
    write("CartPole-v1", "--agent", "r2d2", "--run-dir", "x", "--max-environments", "16")
    resumed = loaded("CartPole-v1", "--resume", "--run-dir", "x", "--eval-episodes", "0")
    assert (resumed.agent, resumed.eval_episodes, resumed.max_environments) == ("r2d2", 0, 16)
    with pytest.raises(ConfigurationError, match="--entropy-cost is for agent vtrace, not r2d2"):
        loaded("CartPole-v1", "--resume", "--run-dir", "x", "--entropy-cost", "0.1")


@pytest.mark.parametrize("preset", preset_names())
def test_what_is_written_down_of_every_preset_can_be_a_preset(preset: str) -> None:
    write("Env-v0", "--preset", preset, "--run-dir", "x", "--seed", "1e3")
    again = loaded("Env-v0", "--preset", f"x/{CONFIG_FILE}", "--run-dir", "x")
    before = loaded("Env-v0", "--preset", preset, "--run-dir", "x", "--seed", "1e3", "--run-id", again.run_id)
    assert again.model_dump(exclude={"preset"}) == before.model_dump(exclude={"preset"})


@pytest.mark.parametrize("value", [1, True, [1]])
def test_a_run_directory_that_is_no_path_is_refused_by_name(value: object) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({"run_dir": value}))
    with pytest.raises(ConfigurationError, match=r"^preset mine\.yaml: run_dir: "):
        loaded("CartPole-v1", "--preset", "mine.yaml")


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("nats://me:hush@h:1", "nats://h:1"),
        ("me:hush@h:1", "h:1"),
        ("h:1, hush@i:1,tls://me:hu@sh@j:1", "h:1, i:1,tls://j:1"),
    ],
)
def test_credentials_in_the_address_of_nats_are_not_written_down(
    url: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_NATS_URL", url)
    write("CartPole-v1", "--run-dir", "x")
    assert yaml.safe_load(Path("x", CONFIG_FILE).read_text())["nats_url"] == written
    resumed = loaded("CartPole-v1", "--run-dir", "x", "--resume")
    assert resumed.nats_url == url


def test_the_help_says_what_a_run_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loaded("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: its directory's name and six hex digits. --" in shown


IGNORED = [
    ("http_port", 8080, "every service takes a free port"),
    ("inference_url", "x:1", "give --host and --port"),
    ("actor_id", "me", "actors have names of their own"),
    ("role", "train", "start seedrl actor with --role eval"),
]


@pytest.mark.parametrize(("name", "value", "advice"), IGNORED)
def test_an_option_that_no_service_would_get_is_refused_with_what_to_do(
    name: str, value: object, advice: str
) -> None:
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ConfigurationError, match=f"^{option} is not for seedrl train: .*{advice}") as caught:
        loaded("CartPole-v1", option, str(value))
    assert "\n" not in str(caught.value)


def test_the_environment_and_presets_may_hold_what_no_service_would_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {name: value for name, value, _ in IGNORED}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert loaded("CartPole-v1", "--preset", "mine.yaml").http_port == 8080
    for name, value in settings.items():
        monkeypatch.setenv(f"SEEDRL_{name.upper()}", str(value))
    assert loaded("CartPole-v1").http_port == 8080


def test_services_answer_http_where_they_are_told() -> None:
    assert loaded("CartPole-v1", "--http-host", "0.0.0.0").http_host == "0.0.0.0"


def test_the_help_says_what_the_seed_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loaded("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Seed of all that is random: environments, initial weights, actions, what replay draws" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "tpu"), r"^--device: must be auto, cpu, cuda or cuda:N"),
        (("--tls-ca", "nofile"), r"^--tls-ca: cannot read nofile: No such file or directory"),
        (("--tls-ca", "empty"), r"^--tls-ca: empty holds no PEM certificates"),
        (("--tls-cert", "nofile", "--tls-key", "nofile"), r"^tls_cert: cannot read nofile: No such file"),
        (
            ("--max-environments", "31"),
            r"max_environments \(31\) must be at least actors × groups × group_size \(1 × 2 × 16 = 32\)",
        ),
        (("--actors", "0"), r"^--actors: "),
        (("--burn-in", "10"), r"^--burn-in is for agent r2d2, not vtrace$"),
        (("--snapshot-seconds", "10"), r"^--snapshot-seconds is for agent r2d2, not vtrace$"),
    ],
)
def test_what_a_service_would_refuse_is_refused_before_there_are_any(
    words: tuple[str, ...], said: str
) -> None:
    Path("empty").touch()
    with pytest.raises(ConfigurationError, match=said):
        loaded("CartPole-v1", *words)


def test_certificates_that_can_be_used_are_accepted(tmp_path: Path) -> None:
    certificates = made_certificates(tmp_path)
    tls = ("--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key))
    assert loaded("CartPole-v1", *tls, "--tls-ca", str(certificates.ca)).tls_ca == certificates.ca


@pytest.mark.parametrize("left_out", ["--tls-ca", "--tls-cert"])
def test_tls_that_the_actors_of_the_run_would_not_speak_is_refused(left_out: str, tmp_path: Path) -> None:
    certificates = made_certificates(tmp_path)
    tls = {"--tls-cert": certificates.cert, "--tls-key": certificates.key, "--tls-ca": certificates.ca}
    for option in (left_out, left_out.replace("cert", "key")):
        tls.pop(option, None)
    words = [word for option, path in tls.items() for word in (option, str(path))]
    with pytest.raises(ConfigurationError, match=r"^tls_cert and tls_ca go together"):
        loaded("CartPole-v1", *words)


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
    assert loaded("ALE/Pong-v5").network == loaded("ale_py:ALE/Pong-v5").network == "impala_shallow"
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


def test_a_setting_that_a_preset_makes_for_another_agent_is_said_to_be_the_presets() -> None:
    Path("mine.yaml").write_text("preset: cartpole\nunroll: 10")
    for preset in ("cartpole", "mine.yaml"):
        with pytest.raises(ConfigurationError) as caught:
            loaded("CartPole-v1", "--preset", preset, "--agent", "r2d2")
        assert str(caught.value) == (
            "reward_scale is for V-trace: with agent r2d2 it must be 1, not 0.1; preset cartpole sets it: "
            "presets for r2d2 are atari_r2d2, atari_r2d2_small, cartpole_r2d2"
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sequence-length", "30"), r"sequence_length \(30\) must be a multiple of unroll \(20\)"),
        (("--reward-scale", "0.1"), r"reward_scale is for V-trace: with agent r2d2 it must be 1, not 0.1$"),
        (("--minibatches", "2"), r"minibatches is for V-trace"),
        (("--entropy-cost", "0.1"), r"^--entropy-cost is for agent vtrace, not r2d2$"),
        (("--n-steps", "100"), r"n_steps \(100\) must not exceed sequence_length \(20\)"),
        (("--burn-in=-1",), r"--burn-in: "),
        (("--replay-ratio", "0"), r"--replay-ratio: "),
        (("--importance-exponent", "2"), r"--importance-exponent: "),
    ],
)
def test_settings_that_do_not_fit_r2d2_are_refused_in_one_line(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        loaded("CartPole-v1", "--agent", "r2d2", *words)
    assert "\n" not in str(caught.value)
