"""The drawing of learning curves."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curve import HEIGHT, MARGIN, WIDTH, curve, main, svg
from services.learner.curves import Curves
from services.local.config import CONFIG_FILE, TrainConfig, write_config

SVG = "{http://www.w3.org/2000/svg}"


def run_with(path: Path, points: list[tuple[int, float]]) -> Path:
    curves = Curves(path)
    for steps, value in points:
        curves.write(steps, {"episodes/mean_return_100": value}, [])
    curves.close()
    return path


def test_a_runs_curve_is_read_and_drawn_to_scale(tmp_path: Path) -> None:
    points = curve(run_with(tmp_path / "pong", [(100, -20.0), (200, 0.0), (400, 20.0)]))
    assert points == [(100.0, -20.0), (200.0, 0.0), (400.0, 20.0)]
    line = ElementTree.fromstring(svg({"a < b": points})).find(f"{SVG}polyline")
    assert line is not None
    drawn = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert drawn[0] == (MARGIN + (WIDTH - 2 * MARGIN) / 4, HEIGHT - MARGIN)
    assert drawn[1][1] == HEIGHT / 2
    assert drawn[2] == (WIDTH - MARGIN, MARGIN)


ATARI_AT_RANDOM = {"env": "ALE/Pong-v5", "env_kwargs": {"frameskip": [2, 5]}}
ATARI_BY_TWO = {"env": "ALE/Pong-v5", "env_kwargs": {"frameskip": 2}}


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ([{"env": "CartPole-v1"}], "environment steps"),
        ([{"env": "ALE/Pong-v5"}], "environment steps (4 frames each)"),
        ([ATARI_BY_TWO, ATARI_BY_TWO], "environment steps (2 frames each)"),
        ([ATARI_BY_TWO, {"env": "ALE/Pong-v5"}], "environment steps"),
        ([ATARI_AT_RANDOM], "environment steps"),
        ([{}], "environment steps"),  # it has no configuration
    ],
)
def test_the_axis_says_how_many_frames_a_step_has(
    configs: list[dict[str, Any]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_with(tmp_path / str(index), [(100, 1.0)]) for index in range(len(configs))]
    for run, values in zip(runs, configs, strict=True):
        if values:
            write_config(TrainConfig.model_validate({"run_dir": run, **values}), run / CONFIG_FILE)
    main([str(run) for run in runs])
    texts = [text.text for text in ElementTree.fromstring(capsys.readouterr().out).findall(f"{SVG}text")]
    assert [text for text in texts if text and "steps" in text] == [words]


def test_runs_whose_directories_have_the_same_name_are_told_apart_by_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in ("seed1", "seed2"):
        run_with(tmp_path / seed / "pong", [(100, 1.0)])
    for arguments, names in (
        (["seed1/pong", "seed2/pong"], ["seed1/pong", "seed2/pong"]),
        (["seed1/pong", "seed1/pong"], ["pong"]),
    ):
        main(arguments)
        drawn = ElementTree.fromstring(capsys.readouterr().out)
        assert len(drawn.findall(f"{SVG}polyline")) == len(names)
        assert [text.text for text in drawn.findall(f"{SVG}text")][-len(names) :] == names


def test_a_run_without_episodes_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"curve: .*nothing is no run directory"):
        curve(tmp_path / "nothing")
