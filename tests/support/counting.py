"""A network whose every output is known; made for the counting environment. Imports torch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import ConfigurationError
from shared.networks.interface import Network, NetworkInput, NetworkOutput, QOutput, State
from shared.specs import EnvironmentSpec, NetworkSpec

_OFFSET = 65536.0  # of the chosen action's logit; above all numbers told, float32 is still exact to 1/128
Q_SCALE = 1024.0
_TOLD = 6  # logits that tell something beside the stacked frames


class Told(NamedTuple):
    """What `told` reads out of the logits; shapes as the logits' but the last axis."""

    count: Tensor  # of the recurrent state: 0 at the episode's first step, 1 at the next …
    instance: Tensor  # of the newest frame
    episode: Tensor
    step: Tensor
    previous_action: Tensor
    previous_reward: Tensor  # as the network gets it, so clipped as the run says
    stacked_steps: Tensor  # […, S]: the step of each stacked frame, oldest first; 0 before the episode
    action: Tensor  # the one that the policy chooses, (instance + count) mod A


class CountingNetwork(Network):
    """Counts, and tells in its logits what it was given: `--network tests.support.counting:CountingNetwork`.

    For `Counting-v0`, whose observation is (instance, episode, step), each from 1. The recurrent state [B, 1]
    is the number of the steps seen since the one with `is_first`, so the count told equals step − 1 wherever
    state and observation belong together: through inference, chunk boundaries, the learner and the policy.

    Logits: 0 count; 1, 2, 3 the newest frame; 4 previous action; 5 previous reward; 6 … 5 + S the step of
    each stacked frame. Action (instance + count) mod A has 65536 more than that, so the policy is certain
    and known in advance; `told` takes the logits apart. Baseline: the count.
    Its parameter is multiplied by 0, so gradients are 0 and no update changes what it tells.
    """

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__()
        leaves = environment.observation
        if len(leaves) != 1 or leaves[0].shape != (3,):
            raise ConfigurationError("the counting network takes (instance, episode, step) only")
        if environment.num_actions < _TOLD + network.frame_stack:
            raise ConfigurationError(f"the counting network needs {_TOLD + network.frame_stack} actions")
        self._leaf = leaves[0].name
        self._num_actions = environment.num_actions
        self._stack = network.frame_stack
        self.unused = nn.Parameter(torch.ones(1))

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 1, device=self.unused.device),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        count = state[0].squeeze(1)
        counts = []
        for is_first in inputs.is_first:
            count = torch.where(is_first, 0.0, count)
            counts.append(count)
            count = count + 1
        frames = inputs.observation[self._leaf].float()  # [T, B, S, 3]
        frames = frames if self._stack > 1 else frames.unsqueeze(2)
        output = self._output(torch.stack(counts), frames, inputs)
        return output, (count.unsqueeze(1),)

    def _output(self, counts: Tensor, frames: Tensor, inputs: NetworkInput) -> NetworkOutput:
        newest = frames[:, :, -1]
        logits = torch.zeros(*counts.shape, self._num_actions, device=counts.device)
        logits[..., 0] = counts
        logits[..., 1:4] = newest
        logits[..., 4] = inputs.previous_action.float()
        logits[..., 5] = inputs.previous_reward
        logits[..., _TOLD : _TOLD + self._stack] = frames[..., 2]
        chosen = (newest[..., 0] + counts).long() % self._num_actions
        logits = logits.scatter_add(-1, chosen.unsqueeze(-1), torch.full_like(logits, _OFFSET))
        nothing = 0.0 * self.unused
        return NetworkOutput(policy_logits=logits + nothing, baseline=counts + nothing)


class CountingQNetwork(CountingNetwork):
    """The same for R2D2: its Q-values are the logits / 1024, which is exact; greedily it acts alike."""

    def forward(self, inputs: NetworkInput, state: State) -> tuple[QOutput, State]:  # type: ignore[override]
        output, state = super().forward(inputs, state)
        return QOutput(q_values=output.policy_logits / Q_SCALE), state


def told(logits: Tensor, frame_stack: int = 1) -> Told:
    """Takes the counting network's logits […, A] apart (chunks hold them as `behaviour_logits`)."""
    action = logits.argmax(-1)
    values = torch.where(logits > _OFFSET / 2, logits - _OFFSET, logits)
    stacked = values[..., _TOLD : _TOLD + frame_stack]
    return Told(*values[..., :_TOLD].unbind(-1), stacked_steps=stacked, action=action)
