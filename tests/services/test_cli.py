"""The command line before a command runs."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli import COMMANDS, SERVICES, main
from tests.support.commands import command, environment


def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "slow.yaml")
    with subprocess.Popen(
        command("train", "CartPole-v1", "--preset", "slow.yaml"),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        with (tmp_path / "slow.yaml").open("w"):  # open as soon as the command reads its preset
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)  # it may have come just before a read, which ends by now
    assert said == "seedrl: interrupted\n"
    assert process.returncode == 130


def test_what_is_imported_before_ctrl_c_is_answered_takes_no_time(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import services.cli; print(*set(sys.modules) - before)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    new = set(result.stdout.split())
    assert "services.cli" in new
    assert {name for name in new if name.startswith("shared")} == set()
    assert not new & {"asyncio", "importlib.metadata", "inspect", "pydantic", "yaml"}


def test_what_cannot_be_written_is_no_success(tmp_path: Path) -> None:
    settings = {**environment(), "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command("--version"), cwd=tmp_path, env=settings, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.stderr == "seedrl: cannot write what was to be said: No space left on device\n"
    assert result.returncode == 1


def test_a_command_can_be_given_where_the_working_directory_is_gone(tmp_path: Path) -> None:
    words = f"cd {tmp_path}; rmdir {tmp_path}; exec {shlex.join(command('status', '/nowhere'))}"
    result = subprocess.run(["sh", "-c", words], env=environment(), capture_output=True, text=True)
    assert "/nowhere is no run's directory" in result.stderr
    assert result.returncode == 2


def test_the_first_process_of_a_container_heeds_sigterm_from_the_start(tmp_path: Path) -> None:
    code = (
        "import os, signal, services.cli as cli\n"
        "me, os.getpid = os.getpid(), lambda: 1\n"  # as there, where the default action is none
        "cli.main(['--version'])\n"
        "os.kill(me, signal.SIGTERM)\n"
        "signal.pause()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), timeout=20)
    assert result.returncode == 128 + signal.SIGTERM


def test_a_process_leaves_without_being_taken_apart(tmp_path: Path) -> None:
    code = (
        "import atexit, services.cli as cli\n"
        "class Torch:\n    def __del__(self): print('taken apart')\n"
        "torch = Torch()\n"
        "atexit.register(print, 'children ended')\n"
        "cli.main = lambda: print('said') or 7\n"
        "cli.leave()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr
    assert result.stdout == "said\nchildren ended\n"


@pytest.mark.parametrize("name", ["train", *SERVICES])
def test_every_option_that_services_share_is_below_a_heading(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    _, _, shown = capsys.readouterr().out.partition("\noptions:\n")
    assert re.findall(r"^  (-[\w-]+)", shown.partition("\n\n")[0], re.MULTILINE) == ["-h", "--preset"]
    assert shown.count("\nRun:\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text_and_a_default_that_may_be_given(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    _, _, shown = capsys.readouterr().out.partition("\noptions:\n")
    for option in re.split(r"^  (?=--)", shown, flags=re.MULTILINE)[1:]:
        assert len(option.split()) > 4, option
        assert not re.search(r"default: (None|\(|\[)|default factory", " ".join(option.split())), option
