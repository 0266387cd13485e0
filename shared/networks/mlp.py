"""A multilayer perceptron over all observation leaves, for everything that is not a picture."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from shared.networks.cores import CoreAndHeads, DuelingHeads, Heads, make_heads, orthogonal
from shared.networks.interface import Network, NetworkInput, Output, State
from shared.networks.leaves import FlatLeaves
from shared.specs import Agent, EnvironmentSpec, NetworkSpec


class MlpNetwork(Network):
    """Tanh layers of `hidden_sizes` with orthogonal weights.

    Without an LSTM, policy (or advantage) and value have a tower each, so that the value's large errors do
    not move the policy's features; an LSTM stands on one tower.
    """

    def __init__(
        self, *, environment: EnvironmentSpec, network: NetworkSpec, agent: Agent = "vtrace"
    ) -> None:
        super().__init__()
        self.leaves = FlatLeaves(environment.observation, network.frame_stack)
        sizes = (self.leaves.size, *network.hidden_sizes)
        self.tower = tower(sizes)
        self.value_tower: nn.Module | None = None
        self.recurrent: CoreAndHeads | None = None
        self.heads: Heads | DuelingHeads | None = None
        actions, dueling_size = environment.num_actions, network.dueling_size
        if network.lstm_size:
            self.recurrent = CoreAndHeads(
                sizes[-1], actions, network.lstm_size, agent=agent, dueling_size=dueling_size
            )
        else:
            self.value_tower = tower(sizes)
            self.heads = make_heads(sizes[-1], sizes[-1], actions, agent=agent, dueling_size=dueling_size)

    def initial_state(self, batch_size: int) -> State:
        """Zeros; empty without an LSTM."""
        return self.recurrent.initial_state(batch_size) if self.recurrent is not None else ()

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        """See `Network`."""
        steps, batch = inputs.is_first.shape
        flat = self.leaves({name: leaf.flatten(0, 1) for name, leaf in inputs.observation.items()})
        flat = flat.unflatten(0, (steps, batch))
        features: Tensor = self.tower(flat)
        if self.recurrent is not None:
            output, state = self.recurrent(features, inputs, state)
            return output, state
        assert self.heads is not None
        assert self.value_tower is not None
        return self.heads(features, self.value_tower(flat)), state


def tower(sizes: Sequence[int]) -> nn.Sequential:
    """Tanh layers from `sizes[0]` inputs to `sizes[-1]` features; the identity for one size."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [orthogonal(nn.Linear(before, after), gain=math.sqrt(2)), nn.Tanh()]
    return nn.Sequential(*layers)
