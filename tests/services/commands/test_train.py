"""What `seedrl train` says of services that have not said anything yet."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from services.commands.train import SILENT_SECONDS, _statuses
from services.local.process import ChildProcess
from services.local.supervisor import SupervisedService
from shared.bus.statuses import StatusBoard


def test_a_service_that_was_just_started_has_not_fallen_silent(tmp_path: Path) -> None:
    process = ChildProcess("learner", lambda: ["true"], environment={}, log=tmp_path / "log")
    learner = SupervisedService(process)
    learner.state = "running"
    run: Any = SimpleNamespace(services={"learner": learner})
    board = StatusBoard()
    assert _statuses(run, board, now=1e6) == {"learner": {}}
    board.note("learner", "l", {"steps": 1})
    seen = board.newest("learner")["seen"]
    assert _statuses(run, board, now=seen)["learner"]["steps"] == 1
    silent = _statuses(run, board, now=seen + SILENT_SECONDS + 1)
    assert silent == {"learner": {"silent_seconds": SILENT_SECONDS + 1}}
    learner.died_at = seen
    assert _statuses(run, board, now=seen + SILENT_SECONDS + 1) == {"learner": {}}
