"""One network's forward and backward pass over a batch, some of its rows in each of several threads.

torch's own threads split every operation and wait for one another after each; beside services that want the
same cores, each wait is as long as the slowest of them. Here the threads meet twice in an update.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.networks.calls import call_network
from shared.networks.interface import NetworkInput, NetworkOutput, State

Context = Callable[[], AbstractContextManager[object]]
Backward = Callable[[Sequence[NetworkOutput], Sequence[Sequence[Tensor]]], None]


class _Part(NamedTuple):
    """Some rows."""

    inputs: NetworkInput
    state: State


class ParallelNetwork:
    """Calls `network` in `threads` threads, each under a context of its own (autocast is a thread's)."""

    def __init__(
        self, network: nn.Module, parameters: Sequence[nn.Parameter], *, threads: int, context: Context
    ) -> None:
        self._network = network
        self._parameters = parameters
        self._context = context
        self._threads = threads
        torch_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "rows", lambda: torch.set_num_threads(torch_threads))

    def __call__(self, inputs: NetworkInput, state: State) -> "Pass":
        """The output for all rows, computed in as many parts as there are threads."""
        if self._threads == 1:
            return Pass(self._computed(_Part(inputs, state)))
        rows = torch.arange(inputs.is_first.shape[1]).tensor_split(self._threads)
        parts = [_part(inputs, state, slice(int(some[0]), int(some[-1]) + 1)) for some in rows if len(some)]
        return _JoinedPass(list(self._pool.map(self._computed, parts)), self._backward)

    def _computed(self, part: _Part) -> NetworkOutput:
        with self._context():
            output = call_network(self._network, part.inputs, part.state)[0]
        return NetworkOutput(output.policy_logits, output.baseline)

    def _backward(self, outputs: Sequence[NetworkOutput], gradients: Sequence[Sequence[Tensor]]) -> None:
        found = list(self._pool.map(self._gradients, outputs, gradients))
        for parameter, *parts in zip(self._parameters, *found, strict=True):
            given = [part for part in parts if part is not None]
            parameter.grad = torch.stack(given).sum(0) if given else None

    def _gradients(self, output: NetworkOutput, gradient: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, self._parameters, gradient, allow_unused=True)


class Pass:
    """One forward pass: its `output`, and the way back from a loss of that to the parameters' gradients."""

    def __init__(self, output: NetworkOutput) -> None:
        self.output = output

    def backward(self, loss: Tensor) -> None:
        """Sets the gradients; to be called once."""
        loss.backward()  # type: ignore[no-untyped-call]


class _JoinedPass(Pass):
    """In parts: the loss goes backward to their joined outputs, and from there each part by itself."""

    def __init__(self, parts: list[NetworkOutput], backward: Backward) -> None:
        joined = (torch.cat(leaves, dim=1).detach() for leaves in zip(*parts, strict=True))
        super().__init__(NetworkOutput._make(leaf.requires_grad_() for leaf in joined))
        self._parts = parts
        self._backward = backward

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        rows = [part.baseline.shape[1] for part in self._parts]
        gradients = [
            torch.split(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, rows, dim=1)
            for leaf in self.output
        ]
        self._backward(self._parts, list(zip(*gradients, strict=True)))


def _part(inputs: NetworkInput, state: State, rows: slice) -> _Part:
    return _Part(inputs.map(lambda value: value[:, rows]), tuple(leaf[rows] for leaf in state))
