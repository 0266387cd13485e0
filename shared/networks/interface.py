"""What inference, the learner and a user's own network agree on. `shared.networks.contract` checks it.

Shapes: `T` steps, `B` rows (environments), `A` actions, `S` the frame stack.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from shared.specs import Agent

State: TypeAlias = tuple[Tensor, ...]
"""Recurrent state: float32 leaves [B, …]; empty without recurrence."""


class NetworkInput(NamedTuple):
    """Time-major inputs of an unroll; inference uses it with T = 1."""

    observation: dict[str, Tensor]  # leaf name -> [T, B, …], [T, B, S, …] when S > 1; oldest frame first
    previous_action: Tensor  # [T, B] int64, 0 where is_first
    previous_reward: Tensor  # [T, B] float32, clipped as the run says, 0 where is_first
    is_first: Tensor  # [T, B] bool: the observation starts an episode

    def map(self, function: Callable[[Tensor], Tensor]) -> "NetworkInput":
        """These inputs, each tensor put through `function`."""
        return NetworkInput(
            observation={name: function(leaf) for name, leaf in self.observation.items()},
            previous_action=function(self.previous_action),
            previous_reward=function(self.previous_reward),
            is_first=function(self.is_first),
        )


class NetworkOutput(NamedTuple):
    """For agent vtrace. Both float32, also under autocast."""

    policy_logits: Tensor  # [T, B, A]
    baseline: Tensor  # [T, B], V(x)


class QOutput(NamedTuple):
    """For agent r2d2. Float32, also under autocast."""

    q_values: Tensor  # [T, B, A], in rescaled space (shared.algorithms.returns)


Output: TypeAlias = NetworkOutput | QOutput

OUTPUTS: dict[Agent, type[Output]] = {"vtrace": NetworkOutput, "r2d2": QOutput}
"""What networks return to which agent."""


class Network(nn.Module):
    """What acts and learns, built as `Net(environment=EnvironmentSpec, network=NetworkSpec)`.

    A network of one's own need not inherit from this: any `nn.Module` with the two methods will do. It is
    made for one agent: for vtrace it returns `NetworkOutput` (policy and value), for r2d2 `QOutput`. If it
    can do both, its constructor takes a third keyword, `agent`, as those that come with the project do.
    Observation leaves keep their own dtype (uint8 images stay uint8), so the network scales them.
    """

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The state before an episode's first step, zeros [batch_size, …] on the network's device."""

    @abstractmethod
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        """Unrolls `T` steps from `state` (before the first) and returns the state after the last.

        Where `inputs.is_first`, the state must be zeroed before it is used. Rows are independent, and an
        unroll of T steps equals T unrolls of one step that pass the state on. What is passed in is not to be
        changed: it may be the very memory that a trajectory is published from. Several threads may call it
        at once (`training_threads`), so nothing of a call may be left on the network.
        """

    if TYPE_CHECKING:
        __call__: Callable[..., tuple[Any, State]]  # which output it is, the run's agent says
