"""What a run leaves for other commands to find it."""

from pathlib import Path

import pytest

from services.local.config import TrainConfig
from services.local.connection import CONNECTION_FILE, Connection, published_connection, read_connection
from services.local.directory import used_directory
from shared.errors import RunError

CONNECTION = Connection("127.0.0.1:1", "hush", "nats://127.0.0.1:2", 3, "mine")


def test_a_run_can_be_found_while_it_goes_on_by_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / CONNECTION_FILE).write_text("of a run that was killed")
    with published_connection(tmp_path, CONNECTION):
        assert read_connection(tmp_path) == CONNECTION
        assert (tmp_path / CONNECTION_FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match="no run goes on there"):
        read_connection(tmp_path)


def test_a_run_whose_supervisor_was_killed_does_not_go_on(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"env": "CartPole-v1", "run_dir": tmp_path})
    with used_directory(config), published_connection(tmp_path, CONNECTION):
        assert read_connection(tmp_path) == CONNECTION
    words = "no run goes on there; its seedrl train was killed"
    with published_connection(tmp_path, CONNECTION), pytest.raises(RunError, match=words):
        read_connection(tmp_path)


def test_a_directory_without_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run's directory"):
        read_connection(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pid": 1}', "null"])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / CONNECTION_FILE).write_text(content)
    with pytest.raises(RunError, match=r"connection\.json is damaged: "):
        read_connection(tmp_path)
