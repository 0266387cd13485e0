import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.errors import ConfigurationError
from shared.networks.build import AVAILABLE, build_network, check_contract
from shared.networks.contract import random_input
from shared.networks.impala_deep import ImpalaDeepNetwork
from shared.networks.impala_shallow import ImpalaShallowNetwork
from shared.networks.interface import NetworkInput, NetworkOutput, Output, QOutput, State
from shared.networks.mlp import MlpNetwork
from shared.networks.nature import NatureNetwork
from shared.networks.pictures import resolved_network
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.counting import CountingNetwork

VECTOR = LeafSpec(name="vector", dtype="float32", shape=(5,), low=(-1.0,), high=(1.0,))
COUNTING = LeafSpec(name="observation", dtype="float32", shape=(3,), low=(0.0,), high=(9.0,))


def image(*shape: int, dtype: str = "uint8") -> LeafSpec:
    return LeafSpec(name="image", dtype=dtype, shape=shape, low=(0.0,), high=(255.0,))


def run_spec(
    name: str, *leaves: LeafSpec, lstm_size: int = 0, frame_stack: int = 1, agent: Agent = "vtrace"
) -> RunSpec:
    return RunSpec(
        environment=EnvironmentSpec(observation=leaves, num_actions=12),
        network=NetworkSpec(name=name, lstm_size=lstm_size, frame_stack=frame_stack),
        agent=agent,
        unroll=20,
        reward_clip=0.0,
    )


def test_every_available_name_builds_its_network() -> None:
    built = {name: type(build_network(run_spec(name, image(36, 36)))) for name in AVAILABLE}
    assert built == {
        "mlp": MlpNetwork,
        "nature": NatureNetwork,
        "impala_shallow": ImpalaShallowNetwork,
        "impala_deep": ImpalaDeepNetwork,
    }


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ((VECTOR,), "mlp"),
        ((image(84, 84),), "impala_shallow"),
        ((VECTOR, image(20, 20, 3)), "impala_shallow"),
        ((image(3, 64, 64, dtype="float32"),), "impala_shallow"),
        ((image(7, 7, 3),), "mlp"),
        ((image(19, 84),), "mlp"),
        ((image(5, 5, dtype="float32"),), "mlp"),
        ((image(30, 30, dtype="int64"),), "mlp"),
    ],
)
def test_auto_takes_a_network_that_can_be_built(leaves: tuple[LeafSpec, ...], expected: str) -> None:
    assert resolved_network("auto", EnvironmentSpec(observation=leaves, num_actions=2)) == expected
    by_name = type(build_network(run_spec(expected, *leaves)))
    assert type(build_network(run_spec("auto", *leaves))) is by_name


def test_another_name_than_auto_is_left_alone() -> None:
    assert (
        resolved_network("my.nets:Net", EnvironmentSpec(observation=(VECTOR,), num_actions=2))
        == "my.nets:Net"
    )


@pytest.mark.parametrize("name", ["nature", "impala_shallow", "impala_deep"])
def test_an_image_network_says_which_network_a_vector_needs(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"network {name} needs an image.*vector.*choose mlp"):
        build_network(run_spec(name, VECTOR))


@pytest.mark.parametrize(("name", "side"), [("nature", 36), ("impala_shallow", 20)])
def test_an_image_too_small_for_the_convolutions_is_told_with_what_would_do(name: str, side: int) -> None:
    words = rf"network {name} needs an image of at least {side}×{side} pixels, not image: uint8\[7, 7, 3\]"
    with pytest.raises(ConfigurationError, match=f"{words}.*choose mlp or impala_deep"):
        build_network(run_spec(name, image(7, 7, 3)))
    with pytest.raises(ConfigurationError):
        build_network(run_spec(name, image(side - 1, 84)))
    build_network(run_spec(name, image(side, side)))
    for other in ("mlp", "impala_deep"):
        build_network(run_spec(other, image(7, 7, 3)))


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(build_network(run_spec("impala_shallow", image(20, 20), lstm_size=8)).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_users_own_network_is_imported_by_module_and_class() -> None:
    network = build_network(run_spec("tests.support.counting:CountingNetwork", COUNTING))
    assert isinstance(network, CountingNetwork)


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_of_a_user.py").write_text(
        "from shared.networks.mlp import MlpNetwork\n\n\nclass Net(MlpNetwork):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert type(build_network(run_spec("nets_of_a_user:Net", VECTOR))).__name__ == "Net"


class NotANetwork:
    pass


class WithoutState(nn.Module):
    pass


class Unbuildable(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()

    def initial_state(self, batch_size: int) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet", "unknown network 'resnet'; there are auto, mlp, nature, impala_shallow, impala_deep, or"),
        ("no_such_module:Net", "there is no module no_such_module$"),
        (
            "shared.my_nets:Net",
            "there is no module shared.my_nets; the name 'shared' belongs to seedrl itself",
        ),
        ("tests.support.counting:Nothing", "module tests.support.counting has no Nothing"),
        ("tests.support.counting:", "unknown network"),
        ("{here}:NotANetwork", "NotANetwork is no torch.nn.Module class"),
        ("{here}:WithoutState", r"WithoutState has no initial_state\(batch_size\)"),
        ("{here}:Unbuildable", "could not be built: TypeError: .*unexpected keyword argument"),
        ("tests.support.counting:CountingNetwork", r"takes \(instance, episode, step\) only"),
    ],
)
def test_a_name_that_gives_no_network_is_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build_network(run_spec(name.format(here=__name__), VECTOR))


def test_a_module_that_fails_to_import_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_to_import.py").write_text("import no_such_thing_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "module fails_to_import could not be imported: ModuleNotFoundError: .*no_such_thing_at_all"
    with pytest.raises(ConfigurationError, match=words):
        build_network(run_spec("fails_to_import:Net", VECTOR))


class AnyAgents(MlpNetwork):
    """Passes the agent on, as its constructor is MlpNetwork's."""


class HandsAllOn(MlpNetwork):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)


class ForOneAgent(CountingNetwork):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)


class Fails(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        raise RuntimeError("no such shape")


class OneAction(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, state = super().forward(inputs, state)
        assert isinstance(output, NetworkOutput)
        return output._replace(policy_logits=output.policy_logits[..., :1]), state


class Columns(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, state = super().forward(inputs, state)
        assert isinstance(output, NetworkOutput)
        return output._replace(baseline=output.baseline.unsqueeze(-1)), state


class Halves(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, state = super().forward(inputs, state)
        assert isinstance(output, NetworkOutput)
        return output._replace(policy_logits=output.policy_logits.bfloat16()), state


class BareState(MlpNetwork):
    def initial_state(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 4)


class StateOfNumbers(MlpNetwork):
    def initial_state(self, batch_size: int) -> Any:
        return (0.0,)


class StateOfDoubles(MlpNetwork):
    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 4, dtype=torch.float64),)


class StateOfLayers(MlpNetwork):
    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(1, batch_size, 4),)


class NoNewState(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> Any:
        return super().forward(inputs, state)[0], None


class TwoNewStates(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, state = super().forward(inputs, state)
        return output, (*state, state[0])


class WideStateInActing(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, (hidden, cell) = super().forward(inputs, state)
        return output, (hidden if self.training else torch.cat([hidden, hidden], -1), cell)


class StateOfEveryStep(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, (hidden, cell) = super().forward(inputs, state)
        return output, (hidden, cell.expand(len(inputs.is_first), -1, -1))


class HalfState(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, (hidden, cell) = super().forward(inputs, state)
        return output, (hidden, cell.bfloat16())


class CountsItsCalls(MlpNetwork):
    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__(environment=environment, network=network)
        self.frozen = nn.BatchNorm1d(3).eval()
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        self.norm(inputs.observation["vector"].flatten(0, 1))
        return super().forward(inputs, state)


def test_q_networks_are_built_for_r2d2() -> None:
    for name in (*AVAILABLE, f"{__name__}:AnyAgents", f"{__name__}:HandsAllOn"):
        spec = run_spec(name, image(36, 36), agent="r2d2")
        network = build_network(spec)
        inputs = random_input(
            spec.environment, spec.network, steps=1, batch=2, generator=torch.Generator().manual_seed(0)
        )
        assert isinstance(network(inputs, network.initial_state(2))[0], QOutput)


def test_a_network_that_hands_its_keywords_on_to_one_without_an_agent_gets_none() -> None:
    build_network(run_spec(f"{__name__}:ForOneAgent", COUNTING))


def test_a_network_for_another_agent_is_refused_in_words() -> None:
    words = "CountingNetwork: forward returns NetworkOutput without q_values: agent r2d2 needs QOutput"
    with pytest.raises(ConfigurationError, match=words):
        build_network(run_spec("tests.support.counting:CountingNetwork", COUNTING, agent="r2d2"))
    words = "CountingQNetwork: forward returns QOutput without policy_logits, baseline: agent vtrace needs"
    with pytest.raises(ConfigurationError, match=words):
        build_network(run_spec("tests.support.counting:CountingQNetwork", COUNTING))


def test_a_network_that_cannot_take_its_inputs_is_refused_with_its_words() -> None:
    with pytest.raises(ConfigurationError, match="Fails: forward raises RuntimeError: no such shape"):
        build_network(run_spec(f"{__name__}:Fails", VECTOR))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("OneAction", r"policy_logits must be \[2, 3, 12\], not \[2, 3, 1\], for 2 steps of 3 rows"),
        ("Columns", r"baseline must be \[2, 3\], not \[2, 3, 1\], for 2 steps of 3 rows"),
        ("Halves", r"policy_logits must be float32, not torch.bfloat16"),
    ],
)
def test_a_network_whose_outputs_have_another_shape_or_dtype_is_refused(network: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{network}: {words}"):
        build_network(run_spec(f"{__name__}:{network}", VECTOR))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("BareState", "initial_state must return a tuple of tensors, not Tensor"),
        ("StateOfNumbers", "state leaf 0 is no tensor but float"),
        ("StateOfDoubles", "state leaf 0 must be float32, not torch.float64"),
        ("StateOfLayers", r"state leaf 0 must be \[B, …\] with B = 3, not \[1, 3, 4\]"),
    ],
)
def test_a_network_whose_initial_state_is_none_is_refused(network: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{network}: {words}"):
        build_network(run_spec(f"{__name__}:{network}", VECTOR))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("NoNewState", "the state that forward returns must be a tuple of tensors, not NoneType"),
        ("TwoNewStates", "the state that forward returns must have the 2 leaves of the initial state, not 3"),
        ("WideStateInActing", r"leaf 0 of the state that forward returns must be \[3, 4\], not \[3, 8\]"),
        ("StateOfEveryStep", r"leaf 1 of the state that forward returns must be \[3, 4\], not \[2, 3, 4\]"),
        ("HalfState", "leaf 1 of the state that forward returns must be float32, not torch.bfloat16"),
    ],
)
def test_a_network_that_returns_another_state_than_its_initial_one_is_refused(
    network: str, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{network}: {words}"):
        build_network(run_spec(f"{__name__}:{network}", VECTOR, lstm_size=4))


def test_to_look_at_a_users_network_leaves_it_as_it_was() -> None:
    network = build_network(run_spec(f"{__name__}:CountsItsCalls", VECTOR))
    assert isinstance(network, CountsItsCalls)
    assert (network.training, network.norm.training, network.frozen.training) == (True, True, False)
    assert network.norm.num_batches_tracked == 0


class OwnMlp(MlpNetwork):
    pass


class OwnNature(NatureNetwork):
    pass


class OwnShallow(ImpalaShallowNetwork):
    pass


class OwnDeep(ImpalaDeepNetwork):
    pass


class NeverForgets(MlpNetwork):
    """A memory that goes on over the end of an episode."""

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        return super().forward(inputs._replace(is_first=torch.zeros_like(inputs.is_first)), state)


class ForgetsItsState(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, _ = super().forward(inputs, state)
        return output, self.initial_state(inputs.is_first.shape[1])


class HalvesItsState(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        state[0].mul_(0.5)
        return super().forward(inputs, state)


class FailsInTraining(MlpNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        if self.training:
            raise ValueError("only in training")
        return super().forward(inputs, state)


class AnswersInBfloat16(NatureNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        output, state = super().forward(inputs, state)
        if torch.is_autocast_enabled("cpu"):
            output = type(output)(*(value.bfloat16() for value in output))
        return output, state


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("NeverForgets", "is_first does not separate an episode from what was before it"),
        ("ForgetsItsState", "differs from a single step"),
        ("HalvesItsState", "forward changes its input state leaf 0"),
        ("FailsInTraining", "forward raises ValueError: only in training"),
    ],
)
def test_a_users_network_that_breaks_the_contract_is_refused(network: str, words: str) -> None:
    spec = run_spec(f"{__name__}:{network}", VECTOR, lstm_size=4)
    build_network(spec)
    with pytest.raises(
        ConfigurationError, match=rf"{network} breaks its contract: .*{words}.*; see docs/networks\.md"
    ):
        check_contract(spec, "auto")


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
@pytest.mark.parametrize(
    ("frame_stack", "lstm_size"),
    [
        (4, 0),
        (1, 16),
        pytest.param(1, 0, marks=pytest.mark.slow),
        pytest.param(4, 16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("network", ["OwnMlp", "OwnNature", "OwnShallow", "OwnDeep"])
def test_a_users_network_that_keeps_the_contract_is_taken(
    network: str, frame_stack: int, lstm_size: int, agent: Agent
) -> None:
    name = f"{__name__}:{network}"
    check_contract(
        run_spec(name, image(40, 40), frame_stack=frame_stack, lstm_size=lstm_size, agent=agent), "bfloat16"
    )


class Loud(nn.Module):
    """Sums thousands of bytes up as they are, so that results near 0 are rounded as large ones."""

    def __init__(self, *, environment: EnvironmentSpec, network: NetworkSpec) -> None:
        super().__init__()
        self.policy = nn.Linear(84 * 84, environment.num_actions)
        self.baseline = nn.Linear(84 * 84, 1)

    def initial_state(self, batch_size: int) -> State:
        return ()

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        pixels = 10 * inputs.observation["image"].flatten(2).float()
        return NetworkOutput(self.policy(pixels), self.baseline(pixels).squeeze(-1)), state


def test_rounding_breaks_no_contract() -> None:
    check_contract(run_spec(f"{__name__}:Loud", image(84, 84)), "auto")


def test_what_no_device_would_compute_in_bfloat16_is_not_tried_in_it() -> None:
    spec = run_spec(f"{__name__}:AnswersInBfloat16", image(40, 40))
    check_contract(spec, "float32")
    with pytest.raises(ConfigurationError, match="under bfloat16 autocast, policy_logits must be float32"):
        check_contract(spec, "auto")


def test_to_try_a_users_network_draws_no_random_number_of_torchs_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_contract(run_spec(f"{__name__}:OwnMlp", VECTOR), "auto")
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_that_come_with_the_project_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.networks.build.check_network", None)
    for name in ("auto", *AVAILABLE):
        check_contract(run_spec(name, image(40, 40)), "auto")
