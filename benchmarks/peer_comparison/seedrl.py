"""seedrl as a contestant: `seedrl train` as a person starts it, read from the learner's own /status."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Reading
from benchmarks.peer_comparison.workload import BATCH_TRAJECTORIES, UNROLL
from services.bench.service_process import http_address

PRESET = "atari_vtrace"
FLAGS = (
    "ALE/Pong-v5",
    f"--preset={PRESET}",
    "--network=nature",
    f"--unroll={UNROLL}",
    f"--batch-size={BATCH_TRAJECTORIES}",
    "--device=cpu",
)

_ROOT = Path(__file__).resolve().parents[2]
_RUN = "run"
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # through no proxy
_ANSWER_SECONDS = 10.0


class Seedrl:
    """One local run with an embedded NATS server."""

    def __init__(self, precision: Literal["auto", "float32"]) -> None:
        self._precision = precision
        self._computes_in = "bfloat16" if precision == "auto" and _cpu_has_bfloat16() else "float32"
        self.name = f"seedrl, {self._computes_in}"

    def command(self, directory: Path) -> list[str]:
        """The command line of a run below `directory`."""
        return [
            *(sys.executable, "-m", "services.cli", "train", *FLAGS),
            *("--precision", self._precision, "--run-dir", str(directory / _RUN)),
        ]

    def environment(self) -> dict[str, str]:
        """Its process environment: no settings of the person who runs it, and this very tree."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SEEDRL_")}
        return clean | {"PYTHONPATH": str(_ROOT)}

    def reading(self, directory: Path) -> Reading | None:
        """The learner's counters now; None before it serves them."""
        address = http_address(directory / _RUN / "logs/learner.log")
        if address is None:
            return None
        try:
            with _DIRECTLY.open(f"http://{address}/status", timeout=_ANSWER_SECONDS) as answer:
                status = json.load(answer)
        except (OSError, urllib.error.URLError) as error:
            raise ComparisonError(f"seedrl's learner does not answer: {error}") from error
        chunks = status["chunks"]
        return Reading(
            seconds=time.monotonic(),
            steps=status["steps"],
            chunks=chunks["trained"] + chunks["refused"],
            refused_chunks=chunks["refused"],
        )

    def settings(self) -> str:
        """For the table."""
        return (
            f"{version('seedrl')}, torch {version('torch')}, ale-py {version('ale-py')}; {self._computes_in}"
        )


def _cpu_has_bfloat16() -> bool:
    import torch  # takes seconds, which --help need not wait for

    from shared.networks.precision import has_bfloat16

    return has_bfloat16(torch.device("cpu"))
