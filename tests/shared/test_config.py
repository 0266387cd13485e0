"""Configuration: what wins over what, and what is refused in which words."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg, CliSuppress

from shared.config import (
    AgentSettings,
    NatsSettings,
    RunSettings,
    ServiceSettings,
    Settings,
    load,
)
from shared.errors import ConfigurationError
from shared.kinds import Unused


class ExampleConfig(Settings, ServiceSettings, NatsSettings, AgentSettings):
    """An example service."""

    speed: float = Field(1.0, gt=0)
    """Speed in metres per second."""
    loud: bool = False
    """Whether it is loud."""
    extras: dict[str, Any] = Field(default_factory=dict)
    """What else there is."""


class OtherConfig(Settings):
    """Another service."""

    depth: int = 1
    """Depth in metres."""


class CommandConfig(Settings, RunSettings):
    """A command."""

    top_floor: CliPositionalArg[int | None] = None
    """Where it goes."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json"))
    """As JSON."""
    depth: Annotated[CliSuppress[int], Unused("it has none; give --speed")] = 1
    """Not told."""


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SEEDRL_"):
            monkeypatch.delenv(name)


def loaded(*arguments: str, known: Sequence[type[Settings]] = (OtherConfig,)) -> ExampleConfig:
    return load(ExampleConfig, arguments, prog="seedrl example", known=known)


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        loaded(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def preset_file(directory: Path, **values: object) -> str:
    path = directory / "preset.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_defaults_hold_when_nothing_is_said() -> None:
    assert loaded().speed == 1.0


def test_command_line_wins_over_environment_over_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_file(tmp_path, speed=2.0, unroll=7, lstm_size=8)
    monkeypatch.setenv("SEEDRL_SPEED", "3.0")
    monkeypatch.setenv("SEEDRL_UNROLL", "9")
    config = loaded("--preset", preset, "--speed", "4.0")
    assert (config.speed, config.unroll, config.lstm_size) == (4.0, 9, 8)


def test_a_preset_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_PRESET", preset_file(tmp_path, speed=2.0))
    assert loaded().speed == 2.0


def test_settings_of_other_services_are_taken_for_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_DEPTH", "5")
    assert loaded("--preset", preset_file(tmp_path, depth=3, speed=2.0)).speed == 2.0


def test_values_of_every_kind_are_read() -> None:
    config = loaded("--hidden-sizes", "32,16", "--loud")
    assert config.hidden_sizes == (32, 16)
    assert config.loud


@pytest.mark.parametrize("text", ["32,16", "[32, 16]", " 32 , 1.6e1"])
def test_the_environment_lists_numbers_as_the_command_line_does(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_HIDDEN_SIZES", text)
    assert loaded().hidden_sizes == (32, 16)
    monkeypatch.setenv("SEEDRL_HIDDEN_SIZES", "32")
    assert loaded().hidden_sizes == (32,)
    monkeypatch.setenv("SEEDRL_HIDDEN_SIZES", "32,many")
    assert refused().startswith("SEEDRL_HIDDEN_SIZES: ")


def test_whole_numbers_in_scientific_notation_are_integers_wherever_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("lstm_size: 1e2\nhidden_sizes: [1e1, 2]")
    monkeypatch.setenv("SEEDRL_UNROLL", "1e1")
    config = loaded("--preset", str(tmp_path / "mine.yaml"), "--batch-size", "2.5e2")
    assert (config.lstm_size, config.unroll, config.batch_size) == (100, 10, 250)
    assert config.hidden_sizes == (10, 2)
    assert refused("--batch-size", "1.5").startswith("--batch-size: ")
    assert refused("--batch-size", "15e-1").startswith("--batch-size: ")


@pytest.mark.parametrize("sizes", ["64x64", "64 64", "64;64"])
def test_a_list_with_anything_but_commas_is_told_of_them(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"wants whole numbers with commas between them, such as 64,64 (got {sizes!r})"
    assert refused("--hidden-sizes", sizes) == f"--hidden-sizes: {said}"
    monkeypatch.setenv("SEEDRL_HIDDEN_SIZES", sizes)
    assert refused() == f"SEEDRL_HIDDEN_SIZES: {said}"


@pytest.mark.parametrize(
    "text", ["unroll: yes", "speed: on", "hidden_sizes: [64, true]", "nats_token_file: 1"]
)
def test_a_value_of_another_kind_in_a_preset_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    name = text.partition(":")[0]
    assert f"mine.yaml: {name}: " in refused("--preset", str(tmp_path / "mine.yaml"))


def test_a_number_in_a_preset_is_no_truth_value_but_may_be_one_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "loud: must be true or false" in refused("--preset", preset_file(tmp_path, loud=1))
    monkeypatch.setenv("SEEDRL_LOUD", "1")
    assert loaded().loud


@pytest.mark.parametrize(
    "option",
    [
        *("--hidden-sizes=64,0", "--hidden-sizes=65537", "--lstm-size=65537", "--dueling-size=-1"),
        *(
            "--unroll=65537",
            "--batch-size=65537",
            "--n-steps=0",
            "--http-port=65536",
            "--grace-seconds=1e300",
        ),
    ],
)
def test_sizes_beyond_their_bounds_are_refused_by_their_flag(option: str) -> None:
    assert refused(option).startswith(f"{option.partition('=')[0]}: ")


def test_an_option_for_another_agent_is_refused_but_not_in_what_serves_many_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("--dueling-size", "8") == "--dueling-size is for agent r2d2, not vtrace"
    assert loaded("--dueling-size", "8", "--agent", "r2d2").dueling_size == 8
    monkeypatch.setenv("SEEDRL_N_STEPS", "3")
    assert loaded("--preset", preset_file(tmp_path, dueling_size=8)).dueling_size == 8


def test_an_option_that_a_command_would_ignore_is_refused_but_not_in_what_serves_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = (ExampleConfig, OtherConfig)
    with pytest.raises(ConfigurationError) as caught:
        load(CommandConfig, ["--depth", "2"], prog="seedrl example", known=known)
    assert str(caught.value) == "--depth is not for seedrl example: it has none; give --speed"
    monkeypatch.setenv("SEEDRL_DEPTH", "2")
    preset = preset_file(tmp_path, depth=3)
    assert load(CommandConfig, ["--preset", preset], prog="x", known=known).depth == 2
    monkeypatch.delenv("SEEDRL_DEPTH")
    assert load(CommandConfig, ["--preset", preset], prog="x", known=known).depth == 3


def test_a_bad_word_without_an_option_is_named_as_help_has_it() -> None:
    with pytest.raises(ConfigurationError, match=r"^TOP-FLOOR: "):
        load(CommandConfig, ["high"], prog="x")


def test_an_unknown_option_is_named() -> None:
    assert "--sped 3" in refused("--sped", "3")


def test_a_bad_value_is_named_with_option_and_reason() -> None:
    assert refused("--speed", "fast").startswith("--speed: ")
    assert "greater than 0" in refused("--speed", "-1")


@pytest.mark.parametrize(
    "value", ["5", "[1]", "null", '"x"', "{bad", "", "size", "is_slippery=false", '{"a": 1},b=2']
)
def test_what_is_no_json_object_is_named(value: str) -> None:
    assert refused("--extras", value).startswith("--extras: no JSON object such as '{\"size\": 5}' (")
    assert refused("--extras", "{}", "--extras", value).startswith("--extras: no JSON object such as")


def test_of_json_objects_given_twice_the_last_has_the_last_word() -> None:
    twice = ("--extras", '{"a": 1, "b": true}', "--extras", '{"a": 2}')
    assert loaded(*twice).extras == {"a": 2, "b": True}


def test_a_backslash_ends_no_string() -> None:
    directory = {"a": "C:\\", "b": 'a"} \\" \\n'}
    assert loaded("--extras", json.dumps(directory)).extras == directory


def test_a_bad_value_in_the_environment_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_UNROLL", "many")
    assert refused().startswith("SEEDRL_UNROLL: ")


def test_an_unknown_environment_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_UNROL", "3")
    assert refused() == "SEEDRL_UNROL is no setting; did you mean SEEDRL_UNROLL?"


def test_an_unknown_preset_says_which_there_are() -> None:
    text = refused("--preset", "nope")
    assert "'nope'" in text
    assert "cartpole" in text


def test_an_unknown_key_in_a_preset_is_named(tmp_path: Path) -> None:
    assert "'sped' is no setting; did you mean speed?" in refused("--preset", preset_file(tmp_path, sped=1))


def test_a_bad_value_in_a_preset_is_named_by_preset_and_key(tmp_path: Path) -> None:
    path = preset_file(tmp_path, speed=-1)
    assert refused("--preset", path).startswith(f"preset {path}: speed: ")


def test_a_bad_value_is_named_by_the_preset_that_holds_it(tmp_path: Path) -> None:
    path = preset_file(tmp_path, speed=-1)
    (tmp_path / "top.yaml").write_text("preset: preset.yaml")
    assert refused("--preset", str(tmp_path / "top.yaml")).startswith(f"preset {path}: speed: ")


def test_a_secret_in_a_preset_is_refused_and_not_shown(tmp_path: Path) -> None:
    text = refused("--preset", preset_file(tmp_path, nats_token="hunter2"))
    assert (
        "preset.yaml: nats_token: presets hold no secrets; give SEEDRL_NATS_TOKEN in the environment" in text
    )
    url = refused("--preset", preset_file(tmp_path, nats_url="nats://me:hunter2@host:4222"))
    assert "preset.yaml: nats_url: presets hold no credentials" in url
    assert "hunter2" not in text + url


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list", "\t:", "\x00"])
def test_malformed_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert f"preset {path}: " in refused("--preset", str(path))


def test_a_preset_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "directory.yaml").mkdir()
    assert "directory" in refused("--preset", str(tmp_path / "directory.yaml"))


def test_a_run_id_that_cannot_be_a_subject_is_refused() -> None:
    assert "run id 'a.b'" in refused("--run-id", "a.b")


def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_NATS_TOKEN", "hunter2")
    assert "hunter2" not in refused("--speed", "-1")
    assert "hunter2" not in repr(load(ExampleConfig, [], prog="x", known=(OtherConfig,)))


def test_a_secret_on_the_command_line_is_refused_and_not_shown() -> None:
    told = refused("--nats-token", "hunter2")
    assert told.startswith("--nats-token: process lists would show it; give SEEDRL_NATS_TOKEN in the environ")
    assert "hunter2" not in told
    told = refused("--nats-url", "nats://me:hunter2@example.org:4222")
    assert told.startswith("--nats-url: process lists would show its credentials; give SEEDRL_NATS_URL in")
    assert "hunter2" not in told


@pytest.mark.parametrize("value", ["", " \n"])
def test_an_empty_secret_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEEDRL_NATS_TOKEN", value)
    assert "nats_token is empty; leave it unset" in refused()


def help_of(model: type[Settings], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        load(model, ["--help"], prog="seedrl example", known=(OtherConfig,))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_fields_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of(ExampleConfig, capsys).split())
    assert "Speed in metres per second." in shown
    assert "Units of the LSTM core" in shown


def test_help_has_the_options_below_headings_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(ExampleConfig, capsys)
    below = {}
    for section in re.split(r"^(?=\S.*:\n  )", shown, flags=re.MULTILINE)[1:]:
        below[section.partition(":\n")[0]] = re.findall(r"^  (--[\w-]+|-h)", section, re.MULTILINE)
    assert below.pop("options") == ["-h", "--speed", "--loud", "--extras", "--preset"]
    assert list(below) == [
        "Run",
        "Network",
        "Training",
        "R2D2 and replay (--agent r2d2)",
        "NATS, tokens and TLS",
        "Logging, HTTP and shutdown",
    ]
    assert below["Run"] == ["--agent", "--run-id"]
    assert below["R2D2 and replay (--agent r2d2)"] == ["--dueling-size", "--n-steps"]


def test_help_says_what_is_for_one_agent_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of(ExampleConfig, capsys).split())
    assert "--n-steps int [r2d2] Rewards" in shown
    assert "--unroll int Steps" in shown


def test_help_shows_values_as_they_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of(ExampleConfig, capsys).split())
    assert "--hidden-sizes int,int,... " in shown
    assert "(default: 64,64)" in shown
    assert loaded("--hidden-sizes", "64,64") == loaded()
    assert "--loud, --no-loud Whether it is loud. (default: false)" in shown
    assert "None" not in shown


def test_help_shows_nothing_that_a_command_ignores(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(CommandConfig, capsys)
    assert "--depth" not in shown
    assert "usage: seedrl example [OPTIONS] [TOP-FLOOR]\n" in shown
