"""Learning curves as TensorBoard reads them."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.learner.curves import DIRECTORY, Curves
from services.learner.episodes import Episode


def test_points_stand_at_their_steps(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.write(100, {"loss/total": 2.0, "absent": None, "broken": float("nan")}, [])
    curves.write(200, {"loss/total": 1.0}, [Episode(10.0, 5), Episode(20.0, 7)])
    curves.close()
    events = EventAccumulator(str(tmp_path / DIRECTORY))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/total", "episodes/return", "episodes/length"}
    assert [(point.step, point.value) for point in events.Scalars("loss/total")] == [(100, 2.0), (200, 1.0)]
    assert events.Scalars("episodes/return")[0].value == pytest.approx(15.0)
    assert events.Scalars("episodes/length")[0].value == pytest.approx(6.0)


def test_without_a_point_nothing_is_written(tmp_path: Path) -> None:
    Curves(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.write(100, {"loss/total": 2.0}, [])
    events = EventAccumulator(str(tmp_path / DIRECTORY)).Reload()
    assert [point.step for point in events.Scalars("loss/total")] == [100]
    curves.close()


def test_a_point_that_the_disk_does_not_take_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.learner.curves._RETRY_SECONDS", 0.0)
    curves = Curves(tmp_path)
    (tmp_path / DIRECTORY).write_text("in the way")
    with capture_logs() as logs:
        curves.write(100, {"loss/total": 2.0}, [])
    assert [entry["event"] for entry in logs] == ["no curves"]
    (tmp_path / DIRECTORY).unlink()
    curves.write(200, {"loss/total": 1.0}, [])
    events = EventAccumulator(str(tmp_path / DIRECTORY)).Reload()
    assert [point.step for point in events.Scalars("loss/total")] == [200]
    curves.close()
