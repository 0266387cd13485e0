"""A `seedrl train` under test: started, watched through its run directory, killed in parts."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from tests.support.commands import command, environment


class LocalRun:
    """A running `seedrl train` and its run directory."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.directory = directory

    def accounts(self) -> dict[str, Any]:
        """The learner's journal; empty before it exists."""
        return self._json("accounts.json")

    def connection(self) -> dict[str, Any]:
        """How to reach the run; empty before it is known."""
        return self._json("connection.json")

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return self._json("summary.json")

    def until(self, condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
        """Waits until `condition` holds; fails when the run ends first or the time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended: {self.process.communicate()}")
            assert time.monotonic() < deadline, f"waited {seconds} s; logs: {self.logs()[-3000:]}"
            time.sleep(0.05)  # polls files; nothing to await

    def until_said(self, words: str, *, seconds: float = 60.0) -> str:
        """The first line on stdout with these words; fails when the run ends first or the time is up."""
        deadline = time.monotonic() + seconds
        assert self.process.stdout is not None
        for line in self.process.stdout:  # one every few seconds
            if words in line:
                return line.rstrip()
            assert time.monotonic() < deadline, f"waited {seconds} s; logs: {self.logs()[-3000:]}"
        raise AssertionError(f"the run ended: {self.process.communicate()}")

    def until_steps(self, steps: int, *, seconds: float = 60.0) -> None:
        """Waits until the learner has consumed `steps` steps in all."""
        self.until(lambda: self.accounts().get("steps", 0) >= steps, seconds=seconds)

    def pid(self, service: str) -> int:
        """Process id of the child that runs `service` (e.g. "learner", "actor")."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and service.encode() in words:
                    return int(path.name)
        raise AssertionError(f"no {service} runs")

    def end(self, number: signal.Signals = signal.SIGINT, *, seconds: float = 60.0) -> tuple[str, str]:
        """Sends a signal and waits for the end; stdout and stderr."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=seconds)

    def finish(self, *, seconds: float = 120.0) -> tuple[str, str]:
        """Waits for the end; stdout and stderr. Fails unless the run exits with 0."""
        output = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0, (output, self.logs()[-3000:])
        return output

    def logs(self) -> str:
        """All services' logs."""
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("logs/*.log")))

    def http_addresses(self) -> dict[str, str]:
        """Where each service answers HTTP, as its log says."""
        found = {}
        for path in self.directory.glob("logs/*.log"):
            for line in path.read_text().splitlines():
                if '"event":"http"' in line:
                    found[path.stem] = str(orjson.loads(line)["address"])
        return found

    def _json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return dict(orjson.loads(path.read_bytes())) if path.exists() else {}


@contextlib.contextmanager
def training(*words: str, directory: Path, cwd: Path, **settings: str) -> Iterator[LocalRun]:
    """A running `seedrl train *words` with `settings` in its environment; killed if it still runs."""
    process = subprocess.Popen(
        command("train", *words, "--run-dir", directory),
        cwd=cwd,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield LocalRun(process, directory)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def assert_exact(summary: dict[str, Any]) -> None:
    """Asserts that every published chunk is accounted for, once."""
    chunks = summary["chunks"]
    assert chunks["published"] == chunks["trained"] + chunks["refused"] + chunks["queued"], chunks
    assert sum(chunks["refused_by_reason"].values()) == chunks["refused"]
