"""The drawing of learning curves."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.curve import HEIGHT, MARGIN, WIDTH, curve, svg
from services.learner.curves import Curves

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


def test_a_run_without_episodes_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"curve: .*nothing is no run directory"):
        curve(tmp_path / "nothing")
