"""`seedrl bench replay`: sequences and priorities per second through a real replay service and work queue."""

from functools import partial

from services.bench.figures import print_figures
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_measuring import measured


def replay(config: ReplayBenchConfig) -> int:
    """Measures and prints; returns the exit status."""
    return print_figures("replay", partial(measured, config), as_json=config.as_json)
