"""Presets: the files that come with the project, and presets that build on others."""

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.presets import nearest, preset_names, preset_path, read_preset

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
    assert read_preset(top, NAMES) == {"speed": 2, "colour": "red"}


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


def test_the_nearest_name_is_given_in_the_style_of_the_mistake() -> None:
    assert nearest("SEEDRL_SPED", NAMES) == "; did you mean SEEDRL_SPEED?"
    assert nearest("zzzzz", NAMES) == ""
