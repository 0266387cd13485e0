"""Prometheus's programs, and its own opinion on what /metrics says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_IN_VENV = Path(__file__).resolve().parents[2] / ".venv" / "bin"


def promtool() -> str:
    """Path of promtool; without it the test is skipped, and fails in CI."""
    return program("promtool")


def program(name: str) -> str:
    """Path of promtool or prometheus; without it the test is skipped, and fails in CI."""
    found = shutil.which(name) or shutil.which(_IN_VENV / name)
    if found is None:
        explain = pytest.fail if os.environ.get("CI") else pytest.skip
        explain(f"no {name}; tools/install-promtool gets it")
    return found


def assert_clean_metrics(exposition: str) -> None:
    """Asserts that `promtool check metrics` finds nothing to say."""
    result = subprocess.run(
        [promtool(), "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
