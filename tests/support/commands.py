"""Runs the `seedrl` command as a person would."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str | Path) -> list[str]:
    """The command line of a `seedrl` command; without the working directory on the path, as the script is."""
    return [sys.executable, "-P", "-m", "services.cli", *map(str, words)]


def environment(**settings: str) -> dict[str, str]:
    """The process environment without settings of the person who runs the tests, plus `settings`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SEEDRL_")}
    return {**clean, "PYTHONPATH": str(ROOT), **settings}


def modules_that_shadow(directory: Path) -> None:
    """Fills `directory` with modules named as the program's own and the standard library's; all raise."""
    for name in ("services/__init__.py", "shared/__init__.py", "secrets.py", "threads.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("raise RuntimeError('from the working directory')\n")


def seedrl(
    *words: str | Path, cwd: Path, timeout: float = 90.0, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(**(settings or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def one_clear_line(result: subprocess.CompletedProcess[str]) -> str:
    """The line a failed command says on stderr; asserts that it is one, without a traceback."""
    assert result.returncode not in (0, 1), (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("seedrl: ")]
    assert len(lines) == 1, result.stderr
    return re.sub(r"\s+", " ", lines[0])
