"""A network's forward pass as CUDA graphs: its kernels are launched at once instead of one by one.

Knows neither streams of actors nor slots.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import ConfigurationError
from shared.networks.calls import call_network
from shared.networks.interface import Network, NetworkInput, Output, State
from shared.telemetry import get_logger

_MOST_GRAPHS = 16  # each keeps its inputs and activations
_WARM_UP = 3  # forward passes in which libraries choose their kernels, before one is captured

log = get_logger(__name__)


class _Graph(NamedTuple):
    """One that was captured, and the memory from which it reads and to which it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: NetworkInput
    state: State
    output: Output
    next_state: State


class GraphedNetwork:
    """Computes what `network` computes, without gradients, for inputs of one step on its CUDA device.

    A graph is captured for each number of rows when it comes for the first time; numbers beyond the first
    16 are computed without one. Where a capture fails, for example as the network waits for the device in the
    middle, the log says so, and all are computed without one from then on. What a network computes in Python
    is done at the capture only.

    The weights may change in place between two calls. Results lie in memory that the next call changes:
    graphs share what they compute in, as they never run at once.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        """Raises ConfigurationError where `device` is not of CUDA."""
        if device.type != "cuda":
            raise ConfigurationError(f"cuda_graphs: there are none on device {device}")
        self._network = network
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, _Graph] = {}
        self._can_be_captured = True

    def __call__(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        """As `Network.forward`, for T = 1."""
        rows = inputs.is_first.shape[1]
        found = self._graphs.get(rows) or self._new(rows, inputs, state)
        if found is None:
            return call_network(self._network, inputs, state)
        for mine, given in zip(_tensors(found.inputs, found.state), _tensors(inputs, state), strict=True):
            mine.copy_(given)
        found.graph.replay()
        return found.output, found.next_state

    @property
    def captured(self) -> frozenset[int]:
        """The numbers of rows for which there is a graph."""
        return frozenset(self._graphs)

    def _new(self, rows: int, inputs: NetworkInput, state: State) -> _Graph | None:
        if not self._can_be_captured or len(self._graphs) == _MOST_GRAPHS:
            return None
        try:
            self._graphs[rows] = self._captured(inputs, state)
        except RuntimeError as error:
            self._can_be_captured = False
            self._graphs.clear()  # the failed one may have let go of what all share
            cause = error.__context__ or error  # the end of a failed capture raises an error of its own
            log.warning("network cannot be captured as a CUDA graph", reason=str(cause))
            return None
        return self._graphs[rows]

    def _captured(self, inputs: NetworkInput, state: State) -> _Graph:
        inputs = inputs.map(torch.clone)
        state = tuple(leaf.clone() for leaf in state)
        graph = torch.cuda.CUDAGraph()
        # Copies of the weights that autocast keeps would stay as they are when the weights change.
        casting = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with casting, torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP):
                    self._network(inputs, state)
                with _raising_where_it_waits():  # a capture that fails in the middle can leave torch unusable
                    self._network(inputs, state)
                # Meanwhile the event loop's thread may take pinned memory, which only this thread must not.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    output, next_state = self._network(inputs, state)
        finally:
            current.wait_stream(self._stream)
        return _Graph(graph, inputs, state, output, next_state)


@contextmanager
def _raising_where_it_waits() -> Iterator[None]:
    """Raises RuntimeError from what waits for a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _tensors(inputs: NetworkInput, state: State) -> list[Tensor]:
    return [*inputs.observation.values(), *inputs[1:], *state]
