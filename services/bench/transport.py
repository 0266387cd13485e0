"""`seedrl bench transport`: rows per second and latency through a real inference service and work queue."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console

from services.bench.figures import figures_table
from services.bench.interruption import uninterrupted
from services.bench.transport_config import TransportConfig
from services.bench.transport_measuring import measured
from shared.telemetry import configure_logging


def transport(config: TransportConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", "auto", "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as directory:
        figures = uninterrupted(measured(config, Path(directory)))
    if config.as_json:
        print(orjson.dumps(asdict(figures)).decode())
    else:
        Console().print(figures_table("transport", asdict(figures)))
    return 0
