"""A policy that costs nothing, so that what remains is the transport."""

import torch
from torch import Tensor, nn

from shared.networks.interface import NetworkInput, NetworkOutput, State
from shared.specs import EnvironmentSpec, NetworkSpec


class FreeNetwork(nn.Module):
    """Gives every observation the same logits and the same value, and never looks at one."""

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__()
        del network
        self.logits = nn.Parameter(torch.zeros(environment.num_actions))
        self.baseline = nn.Parameter(torch.zeros(()))

    def initial_state(self, batch_size: int) -> State:
        """None."""
        del batch_size
        return ()

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        """Views of the parameters."""
        shape = inputs.is_first.shape
        return NetworkOutput(self._spread(self.logits, shape), self._spread(self.baseline, shape)), state

    @staticmethod
    def _spread(value: Tensor, shape: torch.Size) -> Tensor:
        return value.expand(*shape, *value.shape)
