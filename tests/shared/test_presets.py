"""Presets: the files that come with the project, and presets that build on others."""

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.presets import nearest, preset_names, preset_path, presets_with, read_preset

NAMES = {"preset", "speed", "colour"}


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_preset_that_comes_with_the_project_is_there() -> None:
    names = {"cartpole", "atari_vtrace", "atari_vtrace_deep", "atari_vtrace_short"}
    assert names | {"cartpole_r2d2", "atari_r2d2", "atari_r2d2_small"} <= set(preset_names())
    assert all(preset_path(name).is_file() for name in preset_names())


def test_a_preset_may_build_on_another_and_its_own_values_win(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", "speed: 1\ncolour: red")
    middle = written(tmp_path / "middle.yaml", f"preset: {base}\nspeed: 2")
    top = written(tmp_path / "top.yaml", f"preset: {middle}\n")
    values, sources = read_preset(top, NAMES)
    assert values == {"speed": 2, "colour": "red"}
    assert sources == {"speed": middle, "colour": base}


def test_a_preset_that_builds_on_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    written(path, f"preset: {tmp_path / 'b.yaml'}")
    written(tmp_path / "b.yaml", f"preset: {path}")
    with pytest.raises(ConfigurationError, match=r"a\.yaml builds on itself: .*b\.yaml → .*a\.yaml"):
        read_preset(str(path), NAMES)


def test_a_mistake_in_the_preset_below_is_named_with_its_file(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", "sped: 1")
    top = written(tmp_path / "top.yaml", f"preset: {base}")
    with pytest.raises(ConfigurationError, match=r"base\.yaml: 'sped' is no setting; did you mean speed\?"):
        read_preset(top, NAMES)
    with pytest.raises(ConfigurationError, match="unknown preset 'nothing'; there are "):
        read_preset(written(tmp_path / "lost.yaml", "preset: nothing"), NAMES)


def test_a_path_in_a_preset_is_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "base.yaml", "speed: 1")
    written(tmp_path / "mine/base.yaml", "speed: 2\npreset: ../base.yaml\ncolour: red")
    written(tmp_path / "mine/top.yaml", "preset: base.yaml")
    assert read_preset("mine/top.yaml", NAMES).values == {"speed": 2, "colour": "red"}
    written(tmp_path / "base.yaml", "preset: mine/top.yaml")
    with pytest.raises(ConfigurationError, match=r"mine/\.\./mine/top\.yaml builds on itself"):
        read_preset("mine/top.yaml", NAMES)
    written(tmp_path / "mine/named.yaml", "preset: cartpole")
    assert read_preset("mine/named.yaml").values["network"] == "mlp"


def test_a_file_that_is_missing_is_said_to_be_missing(tmp_path: Path) -> None:
    lost = str(tmp_path / "lost.yaml")
    with pytest.raises(ConfigurationError) as caught:
        read_preset(lost, NAMES)
    assert str(caught.value) == f"preset {lost}: there is no such file"
    top = written(tmp_path / "top.yaml", "preset: lost.yaml")
    with pytest.raises(ConfigurationError) as caught:
        read_preset(top, NAMES)
    assert str(caught.value) == f"preset {lost}: there is no such file (preset {top} builds on it)"


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [("speed: 1\ncolour: red\nspeed: 2", "speed", 3), ("colour: {a: 1, a: 1}", "a", 1)],
)
def test_a_key_that_is_there_twice_is_refused(text: str, key: str, line: int, tmp_path: Path) -> None:
    path = written(tmp_path / "twice.yaml", text)
    with pytest.raises(ConfigurationError) as caught:
        read_preset(path, NAMES)
    assert str(caught.value) == f"preset {path}: '{key}' is set twice, again in line {line}"


@pytest.mark.parametrize("text", ["preset: 3", "preset: [a]", "preset: yes"])
def test_what_cannot_be_the_name_of_a_preset_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"preset must be a name or a \.yaml file, not "):
        read_preset(written(tmp_path / "odd.yaml", text), NAMES)


def test_a_date_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"not YAML: month must be in 1\.\.12"):
        read_preset(written(tmp_path / "date.yaml", "speed: 2001-99-99"), NAMES)


def test_presets_are_found_by_what_they_set() -> None:
    assert presets_with("agent", "r2d2") == ["atari_r2d2", "atari_r2d2_small", "cartpole_r2d2"]


def test_the_nearest_name_is_given_in_the_style_of_the_mistake() -> None:
    assert nearest("SEEDRL_SPED", NAMES) == "; did you mean SEEDRL_SPEED?"
    assert nearest("zzzzz", NAMES) == ""
