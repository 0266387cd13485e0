import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.networks.build import build_network
from shared.networks.contract import check_network, random_input
from shared.networks.interface import Network, NetworkInput, NetworkOutput, QOutput, State
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.counting import CountingNetwork

VECTOR = LeafSpec(name="vector", dtype="float32", shape=(5,), low=(float("-inf"),), high=(float("inf"),))
INTEGERS = LeafSpec(name="integers", dtype="int32", shape=(2, 2), low=(-3.0,), high=(3.0,))
DISCRETE = LeafSpec(name="discrete", dtype="int64", shape=(), low=(0.0,), high=(3.0,), n=4)
GREY = LeafSpec(name="grey", dtype="uint8", shape=(36, 36), low=(0.0,), high=(255.0,))
RGB = LeafSpec(name="rgb", dtype="uint8", shape=(36, 40, 3), low=(0.0,), high=(255.0,))
PLANES = LeafSpec(name="planes", dtype="float32", shape=(4, 36, 36), low=(0.0,), high=(1.0,))
GRID = LeafSpec(name="grid", dtype="uint8", shape=(7, 7, 3), low=(0.0,), high=(255.0,))

SPACES = {
    "mlp": [(VECTOR,), (DISCRETE,), (VECTOR, INTEGERS, DISCRETE), (GRID, DISCRETE)],
    "nature": [(GREY,), (RGB, VECTOR), (PLANES, DISCRETE)],
    "impala_shallow": [(GREY,), (RGB,), (PLANES, GREY, VECTOR, INTEGERS)],
    "impala_deep": [(GREY,), (GRID, VECTOR), (PLANES, DISCRETE)],
}


def built_in_networks() -> Iterator[Any]:
    """Every combination; `slow` are those in which all parts are in others, too."""
    for (name, spaces), lstm_size, frame_stack in itertools.product(SPACES.items(), (0, 8), (1, 3)):
        for leaves, (agent, dueling_size) in itertools.product(
            spaces, (("vtrace", 0), ("r2d2", 0), ("r2d2", 6))
        ):
            is_plain, is_whole = leaves is spaces[0] and frame_stack == 1, lstm_size and frame_stack > 1
            marks = () if is_plain or (is_whole and agent == "vtrace") else pytest.mark.slow
            yield pytest.param(name, leaves, agent, dueling_size, lstm_size, frame_stack, marks=marks)


@pytest.mark.parametrize(
    ("name", "leaves", "agent", "dueling_size", "lstm_size", "frame_stack"), list(built_in_networks())
)
def test_every_built_in_network_meets_the_contract(
    name: str,
    leaves: tuple[LeafSpec, ...],
    agent: Agent,
    dueling_size: int,
    lstm_size: int,
    frame_stack: int,
) -> None:
    torch.manual_seed(0)
    environment = EnvironmentSpec(observation=leaves, num_actions=5)
    spec = NetworkSpec(
        name=name,
        lstm_size=lstm_size,
        frame_stack=frame_stack,
        hidden_sizes=(16, 8),
        dueling_size=dueling_size,
    )
    run = RunSpec(environment=environment, network=spec, agent=agent, unroll=5, reward_clip=0.0)
    check_network(build_network(run), environment, spec, agent=agent)


SMALL = EnvironmentSpec(observation=(VECTOR,), num_actions=3)


class Model(Network):
    """A correct recurrent network; the classes below each break one point."""

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__()
        del network
        self.cell = nn.GRUCell(5, 6)
        self.policy = nn.Linear(6, environment.num_actions)
        self.baseline = nn.Linear(6, 1)

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 6),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        (hidden,) = state
        outputs = []
        for x, is_first in zip(inputs.observation["vector"], inputs.is_first, strict=True):
            hidden = self.cell(x, self.reset(hidden, is_first)).float()
            outputs.append(hidden)
        features = torch.stack(outputs)
        return NetworkOutput(self.policy(features).float(), self.baseline(features).squeeze(-1).float()), (
            hidden,
        )

    def reset(self, hidden: Tensor, is_first: Tensor) -> Tensor:
        return hidden.masked_fill(is_first.unsqueeze(1), 0)


class ForgetsToReset(Model):
    def reset(self, hidden: Tensor, is_first: Tensor) -> Tensor:
        return hidden


class ResetsOnlyAtTheStart(Model):
    """Looks at is_first of the unroll's first step only."""

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        first = inputs.is_first.clone()
        first[1:] = False
        return super().forward(inputs._replace(is_first=first), state)


class StartsWithOnes(Model):
    def initial_state(self, batch_size: int) -> State:
        return (torch.ones(batch_size, 6),)


class StateNotBatchFirst(Model):
    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(1, batch_size, 6),)


class HalfPrecisionOutputs(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(policy_logits=self.policy(state[0]).expand_as(output.policy_logits)), state


class BaselineWithAnAxisTooMany(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(baseline=output.baseline.unsqueeze(-1)), state


class MixesRows(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(baseline=output.baseline - output.baseline.mean(1, keepdim=True)), state


class ChangesItsInput(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        inputs.observation["vector"].mul_(2)
        return super().forward(inputs, state)


class ChangesItsState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, after = super().forward(inputs, state)
        state[0].copy_(after[0])
        return output, after


class HalvesItsState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        state[0].mul_(0.5)
        return super().forward(inputs, state)


class ClearsItsState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        state[0][inputs.is_first[0]] = 0.0
        return super().forward(inputs, state)


class LooksAhead(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(baseline=output.baseline.roll(-1, 0)), state


class ReturnsTheOldState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        return super().forward(inputs, state)[0], state


class HidesWeights(Model):
    def __init__(self, **specs: Any) -> None:
        super().__init__(**specs)
        self.hidden_scale = [2.0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "HidesWeights":
        other = HidesWeights(environment=SMALL, network=NetworkSpec(name=""))
        other.hidden_scale[0] = 3.0
        return other

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(baseline=output.baseline * self.hidden_scale[0]), state


class HasAnUnusedParameter(Model):
    def __init__(self, **specs: Any) -> None:
        super().__init__(**specs)
        self.forgotten = nn.Parameter(torch.ones(1))


class ReturnsOnlyTheOutput(Model):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        return super().forward(inputs, state)[0]


class ReturnsNoState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        return super().forward(inputs, state)[0], None


class ReturnsABareState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, (hidden,) = super().forward(inputs, state)
        return output, hidden


class ReturnsAListAsState(Model):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, state = super().forward(inputs, state)
        return output, list(state)


class ReturnsTwoStates(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state[:1])
        return output, state + state


class ReturnsTheStateOfEveryStep(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, (hidden,) = super().forward(inputs, state)
        return output, (hidden.expand(len(inputs.is_first), -1, -1),)


class Fails(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        raise KeyError("image")


class FailsBackwards(Model):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        return output._replace(
            baseline=output.baseline.detach(), policy_logits=_Fails.apply(output[0])
        ), state


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Tensor:
        raise NotImplementedError("no derivative")


class CannotBeCopied(Model):
    def __deepcopy__(self, memo: dict[int, Any]) -> "CannotBeCopied":
        raise RuntimeError("one of a kind")


class NotAModule:
    def __init__(self, **specs: Any) -> None:
        pass


class WithoutInitialState(nn.Linear):
    def __init__(self, **specs: Any) -> None:
        super().__init__(5, 3)


class Pair:
    """An output of a kind of its own."""

    def __init__(self, output: NetworkOutput) -> None:
        self.baseline, self.policy_logits = output.baseline, output.policy_logits


class ReturnsAnotherKind(Model):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, state = super().forward(inputs, state)
        return Pair(output), state


class QModel(Model):
    """A correct network for R2D2."""

    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, state = super().forward(inputs, state)
        return QOutput(output.policy_logits + output.baseline.unsqueeze(-1)), state


class HalfPrecisionQ(QModel):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, state = super().forward(inputs, state)
        return QOutput(output.q_values.bfloat16()), state


class QWithoutTheLastAction(QModel):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        output, state = super().forward(inputs, state)
        return QOutput(output.q_values[..., :-1]), state


class QForgetsToReset(QModel):
    def reset(self, hidden: Tensor, is_first: Tensor) -> Tensor:
        return hidden


class CountsSteps(Model):
    """Knows no number of steps above an episode's limit, and none below 0."""

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__(environment=environment, network=network)
        self.places = nn.Embedding(50, 6)
        self.body = nn.Linear(5, 6)
        del self.cell

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        (count,) = state
        counts = []
        for is_first in inputs.is_first:
            count = count.masked_fill(is_first, 0)
            counts.append(count)
            count = count + 1
        places = self.places(torch.stack(counts).long())
        features = (self.body(inputs.observation["vector"]) + places).tanh().float()
        return NetworkOutput(self.policy(features).float(), self.baseline(features).squeeze(-1).float()), (
            count,
        )


class MasksActions(Model):
    lowest = -3.4e38

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        may_be_taken = inputs.observation["vector"][..., :3] > 0
        return output._replace(
            policy_logits=output.policy_logits + torch.where(may_be_taken, 0.0, self.lowest)
        ), state


class MasksActionsAndMixesRows(MasksActions):
    lowest = -1e9

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        output, state = super().forward(inputs, state)
        rows = inputs.observation["vector"].mean((1, 2)).view(-1, 1, 1)
        return output._replace(policy_logits=output.policy_logits + rows), state


class LstmOfTorch(Model):
    """Under autocast it computes in bfloat16, for which some CPUs have no kernel."""

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__(environment=environment, network=network)
        self.lstm = nn.LSTM(5, 6)
        del self.cell

    def initial_state(self, batch_size: int) -> State:
        return torch.zeros(batch_size, 6), torch.zeros(batch_size, 6)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        outputs = []
        for x, is_first in zip(inputs.observation["vector"], inputs.is_first, strict=True):
            hidden, cell = (self.reset(leaf, is_first).unsqueeze(0) for leaf in state)
            output, (hidden, cell) = self.lstm(x.unsqueeze(0), (hidden, cell))
            state = hidden[0].float(), cell[0].float()
            outputs.append(output[0])
        features = torch.stack(outputs)
        return NetworkOutput(
            self.policy(features).float(), self.baseline(features).squeeze(-1).float()
        ), state


BROKEN_Q = [
    (Model, "returns NetworkOutput without q_values: agent r2d2 needs QOutput"),
    (HalfPrecisionQ, "q_values must be float32"),
    (QWithoutTheLastAction, r"q_values must be \[4, 3, 3\]"),
    (QForgetsToReset, "is_first does not separate"),
]

BROKEN = [
    (ForgetsToReset, "is_first does not separate"),
    (ResetsOnlyAtTheStart, "differs from a single step|is_first does not separate"),
    (StartsWithOnes, "must be zeros"),
    (StateNotBatchFirst, r"must be \[B, …\]"),
    (HalfPrecisionOutputs, "under bfloat16 autocast, policy_logits must be float32"),
    (BaselineWithAnAxisTooMany, "baseline must be"),
    (MixesRows, "row"),
    (MasksActionsAndMixesRows, "row|differs from a single step"),
    (ChangesItsInput, "changes its input observation vector"),
    (ChangesItsState, "changes its input state leaf 0"),
    (HalvesItsState, "changes its input state leaf 0"),
    (ClearsItsState, "changes its input state leaf 0"),
    (LooksAhead, "differs from a single step"),
    (ReturnsTheOldState, "single step"),
    (HidesWeights, "loaded from state_dict"),
    (HasAnUnusedParameter, "no gradient reaches parameter forgotten"),
    (ReturnsOnlyTheOutput, "must return the output and the new state, not NetworkOutput alone"),
    (ReturnsNoState, "state that forward returns must be a tuple of tensors, not NoneType"),
    (ReturnsABareState, "state that forward returns must be a tuple of tensors, not Tensor"),
    (ReturnsAListAsState, "state that forward returns must be a tuple of tensors, not list"),
    (ReturnsTwoStates, "must have the 1 leaves of the initial state, not 2"),
    (
        ReturnsTheStateOfEveryStep,
        r"leaf 0 of the state that forward returns must be \[3, 6\], not \[4, 3, 6\]",
    ),
    (Fails, "forward raises KeyError: 'image'"),
    (FailsBackwards, "the backward pass raises NotImplementedError: no derivative"),
    (CannotBeCopied, "deepcopy of the network raises RuntimeError: one of a kind"),
    (NotAModule, "object of torch.nn.Module, not NotAModule"),
    (WithoutInitialState, r"has no initial_state\(batch_size\)"),
]


@pytest.mark.parametrize("correct", [Model, ReturnsAnotherKind, CountsSteps, MasksActions, LstmOfTorch])
def test_a_correct_network_of_ones_own_meets_the_contract(correct: type[Model]) -> None:
    spec = NetworkSpec(name="own:Model")
    check_network(correct(environment=SMALL, network=spec), SMALL, spec)


def test_a_correct_q_network_of_ones_own_meets_the_contract() -> None:
    spec = NetworkSpec(name="own:QModel")
    check_network(QModel(environment=SMALL, network=spec), SMALL, spec, agent="r2d2")
    with pytest.raises(
        AssertionError, match="without policy_logits, baseline: agent vtrace needs NetworkOutput"
    ):
        check_network(QModel(environment=SMALL, network=spec), SMALL, spec)


@pytest.mark.parametrize(("broken", "words"), BROKEN_Q)
def test_what_a_q_network_breaks_is_said_in_words(broken: type[Model], words: str) -> None:
    torch.manual_seed(0)
    spec = NetworkSpec(name="own:Broken")
    with pytest.raises(AssertionError, match=words):
        check_network(broken(environment=SMALL, network=spec), SMALL, spec, agent="r2d2")


@pytest.mark.parametrize(("broken", "words"), BROKEN)
def test_what_a_network_breaks_is_said_in_words(broken: type[Any], words: str) -> None:
    torch.manual_seed(0)
    spec = NetworkSpec(name="own:Broken")
    with pytest.raises(AssertionError, match=words):
        check_network(broken(environment=SMALL, network=spec), SMALL, spec)


@pytest.mark.parametrize("frame_stack", [1, 4])
def test_the_counting_network_meets_the_contract(frame_stack: int) -> None:
    leaf = LeafSpec(name="observation", dtype="int64", shape=(3,), low=(0.0,), high=(2.0**20,))
    environment = EnvironmentSpec(observation=(leaf,), num_actions=16)
    spec = NetworkSpec(name="tests.support.counting:CountingNetwork", frame_stack=frame_stack)
    check_network(CountingNetwork(environment=environment, network=spec), environment, spec)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("float32", (0.0, 100.0), (1.0, 200.0)),
        ("float32", (-1000.0,), (-500.0,)),
        ("float32", (-3.4e38, -np.inf), (3.4e38, np.inf)),
        ("float64", (-np.inf,), (-700.0,)),
        ("int64", (0.0, 0.0), (3.0, 200.0)),
        ("uint8", (0.0, 10.0), (255.0, 20.0)),
    ],
)
def test_random_inputs_stay_within_each_elements_own_bounds(
    dtype: str, low: tuple[float, ...], high: tuple[float, ...]
) -> None:
    leaf = LeafSpec(name="x", dtype=dtype, shape=(2,), low=low, high=high)
    environment = EnvironmentSpec(observation=(leaf,), num_actions=2)
    generator = torch.Generator().manual_seed(1)
    inputs = random_input(environment, NetworkSpec(name=""), steps=50, batch=3, generator=generator)
    values = inputs.observation["x"].double()
    assert (values >= torch.tensor(low)).all()
    assert (values <= torch.tensor(high)).all()
    assert values.std(dim=(0, 1)).min() > 0
    assert dtype == "uint8" or (values.amax(dim=(0, 1)) - values.amin(dim=(0, 1))).max() <= 20


def test_random_inputs_stay_within_the_spaces_and_zero_what_precedes_an_episode() -> None:
    environment = EnvironmentSpec(observation=(VECTOR, INTEGERS, DISCRETE, RGB), num_actions=5)
    inputs = random_input(
        environment,
        NetworkSpec(name="", frame_stack=4),
        steps=8,
        batch=3,
        generator=torch.Generator().manual_seed(1),
    )
    shapes = {name: tuple(leaf.shape) for name, leaf in inputs.observation.items()}
    assert shapes["rgb"] == (8, 3, 4, 36, 40, 3)
    assert shapes["discrete"] == (8, 3, 4)
    assert inputs.observation["integers"].dtype == torch.int32
    assert inputs.observation["integers"].abs().max() == 3
    assert set(inputs.observation["discrete"].unique().tolist()) == {0, 1, 2, 3}
    assert inputs.observation["rgb"].max() > 250
    assert inputs.is_first.any()
    assert not inputs.previous_action[inputs.is_first].any()
    assert not inputs.previous_reward[inputs.is_first].any()
