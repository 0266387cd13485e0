"""What follows a torso: a recurrent core, if any, and the heads of the run's agent."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.networks.interface import NetworkInput, NetworkOutput, Output, QOutput, State
from shared.networks.leaves import one_hot
from shared.specs import Agent


class LstmCore(nn.Module):
    """An LSTM over the features, the clipped previous reward and the one-hot previous action.

    It computes in float32 also under autocast: a cell state in bfloat16 forgets what it adds in small steps.
    torch's fused LSTM runs over stretches of time in which no row starts an episode: for 20 steps of 32 rows
    and size 256, 12 ms where none does, 14 ms for 4 stretches, 35 ms for 20; stepping by hand 26 ms always.
    """

    def __init__(self, features: int, num_actions: int, size: int) -> None:
        super().__init__()
        self._num_actions = num_actions
        self._size = size
        self.lstm = nn.LSTM(features + 1 + num_actions, size)
        with torch.no_grad():
            forget = slice(size, 2 * size)
            self.lstm.get_parameter("bias_ih_l0")[forget] = 1.0  # remember by default
            self.lstm.get_parameter("bias_hh_l0")[forget] = 0.0

    def initial_state(self, batch_size: int) -> State:
        """Hidden and cell state, zeros [batch_size, size]."""
        like = next(self.lstm.parameters())
        return like.new_zeros(batch_size, self._size), like.new_zeros(batch_size, self._size)

    def forward(self, features: Tensor, inputs: NetworkInput, state: State) -> tuple[Tensor, State]:
        """`features` [T, B, F] to outputs [T, B, size] and the state after them."""
        with torch.autocast(features.device.type, enabled=False):
            previous_action = one_hot(inputs.previous_action, self._num_actions)
            previous_reward = inputs.previous_reward.unsqueeze(-1)
            return self._unroll(
                torch.cat([features.float(), previous_reward, previous_action], dim=-1),
                inputs.is_first,
                state,
            )

    def _unroll(self, core_input: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, cell = state
        outputs = []
        for start, stop in stretches(is_first):
            resets = is_first[start].unsqueeze(1)
            hidden, cell = hidden.masked_fill(resets, 0.0), cell.masked_fill(resets, 0.0)
            output, (hidden, cell) = self.lstm(
                core_input[start:stop], (hidden.unsqueeze(0), cell.unsqueeze(0))
            )
            hidden, cell = hidden.squeeze(0), cell.squeeze(0)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs), (hidden, cell)


class Heads(nn.Module):
    """Policy logits and baseline, in float32 also under autocast."""

    def __init__(self, policy_features: int, value_features: int, num_actions: int) -> None:
        super().__init__()
        # A policy that starts nearly uniform explores; a value that starts near its scale is not harmful.
        self.policy = orthogonal(nn.Linear(policy_features, num_actions), gain=0.01)
        self.baseline = orthogonal(nn.Linear(value_features, 1), gain=1.0)

    def forward(self, policy_features: Tensor, value_features: Tensor) -> NetworkOutput:
        """Features […, F] to logits […, A] and baseline […]."""
        with torch.autocast(policy_features.device.type, enabled=False):
            return NetworkOutput(
                policy_logits=self.policy(policy_features.float()),
                baseline=self.baseline(value_features.float()).squeeze(-1),
            )


class DuelingHeads(nn.Module):
    """Q = V + A − mean A, in float32 also under autocast (Wang et al. 2016, arXiv 1511.06581).

    `hidden` are the units of a hidden layer in each of the two heads; 0: none.
    """

    def __init__(self, policy_features: int, value_features: int, num_actions: int, hidden: int = 0) -> None:
        super().__init__()
        self.advantage = _head(policy_features, num_actions, hidden)
        self.value = _head(value_features, 1, hidden)

    def forward(self, policy_features: Tensor, value_features: Tensor) -> QOutput:
        """Features […, F] to Q-values […, A]."""
        with torch.autocast(policy_features.device.type, enabled=False):
            advantage = self.advantage(policy_features.float())
            value = self.value(value_features.float())
            return QOutput(q_values=value + advantage - advantage.mean(dim=-1, keepdim=True))


def make_heads(
    policy_features: int, value_features: int, num_actions: int, *, agent: Agent, dueling_size: int
) -> Heads | DuelingHeads:
    """What the agent needs: policy and value, or Q-values."""
    if agent == "r2d2":
        return DuelingHeads(policy_features, value_features, num_actions, dueling_size)
    return Heads(policy_features, value_features, num_actions)


class CoreAndHeads(nn.Module):
    """The LSTM core, when `lstm_size` is not 0, and the heads."""

    def __init__(
        self,
        features: int,
        num_actions: int,
        lstm_size: int,
        *,
        agent: Agent = "vtrace",
        dueling_size: int = 0,
    ) -> None:
        super().__init__()
        self.core = LstmCore(features, num_actions, lstm_size) if lstm_size else None
        size = lstm_size or features
        self.heads = make_heads(size, size, num_actions, agent=agent, dueling_size=dueling_size)

    def initial_state(self, batch_size: int) -> State:
        """Zeros; empty without a core."""
        return self.core.initial_state(batch_size) if self.core is not None else ()

    def forward(self, features: Tensor, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        """`features` [T, B, F]."""
        if self.core is not None:
            features, state = self.core(features, inputs, state)
        return self.heads(features, features), state


def _head(features: int, outputs: int, hidden: int) -> nn.Module:
    # Targets bootstrap from what the heads say, so what they say by chance would first have to be unlearned.
    if not hidden:
        return orthogonal(nn.Linear(features, outputs), gain=0.01)
    layer = orthogonal(nn.Linear(features, hidden), gain=math.sqrt(2))
    return nn.Sequential(layer, nn.ReLU(), orthogonal(nn.Linear(hidden, outputs), gain=0.01))


def stretches(is_first: Tensor) -> list[tuple[int, int]]:
    """Cuts the T steps of `is_first` [T, B] where any row starts an episode: pairs of start and stop."""
    steps = len(is_first)
    if steps == 1:
        return [(0, 1)]  # inference: no look at the values, which would wait for a GPU
    begins = is_first[1:].any(dim=1).tolist()  # the only look at the values: one wait for a GPU
    cuts = [t for t, begin in enumerate(begins, 1) if begin]
    return list(zip([0, *cuts], [*cuts, steps], strict=True))


Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)


def orthogonal(layer: Layer, gain: float) -> Layer:
    """`layer` with orthogonal weights and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
