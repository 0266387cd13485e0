"""`seedrl bench transport`: rows per second and latency through a real inference service and work queue."""

from functools import partial

from services.bench.figures import print_figures
from services.bench.transport_config import TransportConfig
from services.bench.transport_measuring import measured


def transport(config: TransportConfig) -> int:
    """Measures and prints; returns the exit status."""
    return print_figures("transport", partial(measured, config), as_json=config.as_json)
