"""One run of one contestant: a fresh start, warming up, a window; knows no contestant in particular."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Reading, Window
from benchmarks.peer_comparison.processes import System, running

_START_SECONDS = 300.0
_STALL_SECONDS = 120.0
_POLL_SECONDS = 0.1


class Contestant(Protocol):
    """A system that trains on Pong and counts its steps."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    def command(self, directory: Path) -> list[str]:
        """The command line of a run in `directory`."""

    def environment(self) -> dict[str, str]:
        """The environment variables of the run."""

    def reading(self, directory: Path) -> Reading | None:
        """Its newest counters; None before there are any."""

    def settings(self) -> str:
        """Versions and what else the table should say of it."""


class Timing(NamedTuple):
    """How long a run warms up after its first trained step, and is then measured."""

    warm_up_seconds: float
    window_seconds: float


def measured_window(contestant: Contestant, timing: Timing) -> Window:
    """Starts the contestant, measures one window, ends it. Raises ComparisonError when it does not train.

    The window begins and ends where the steps move, so that it holds whole updates; between the two
    nobody asks the contestant anything.
    """
    with tempfile.TemporaryDirectory(prefix="seedrl-peers-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        command, environment = contestant.command(directory), contestant.environment()
        with running(contestant.name, command, environment=environment, directory=directory) as system:
            _moved(contestant, system, directory, within=_START_SECONDS)
            system.pause(timing.warm_up_seconds)
            first = _moved(contestant, system, directory, within=_STALL_SECONDS)
            system.pause(timing.window_seconds)
            last = _moved(contestant, system, directory, within=_STALL_SECONDS)
            return Window(first, last)


def _moved(contestant: Contestant, system: System, directory: Path, *, within: float) -> Reading:
    """The first reading with other steps than now; none at all counts as 0."""
    now = contestant.reading(directory)
    before = now.steps if now else 0
    deadline = time.monotonic() + within
    while (reading := contestant.reading(directory)) is None or reading.steps == before:
        if time.monotonic() > deadline:
            raise ComparisonError(
                f"{contestant.name} has trained nothing for {within:.0f} s: {system.last_words()}"
            )
        system.pause(_POLL_SECONDS)
    return reading
