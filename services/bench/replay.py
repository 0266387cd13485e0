"""`seedrl bench replay`: sequences and priorities per second through a real replay service and work queue."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console

from services.bench.figures import figures_table
from services.bench.interruption import uninterrupted
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_measuring import measured
from shared.telemetry import configure_logging


def replay(config: ReplayBenchConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", "auto", "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as directory:
        figures = uninterrupted(measured(config, Path(directory)))
    if config.as_json:
        print(orjson.dumps(asdict(figures)).decode())
    else:
        Console().print(figures_table("replay", asdict(figures)))
    return 0
