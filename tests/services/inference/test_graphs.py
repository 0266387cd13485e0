import numpy as np
import pytest
import torch
from torch import Tensor

from services.inference.assembler import StepArrays
from services.inference.config import InferenceConfig
from services.inference.graphs import GraphedNetwork
from services.inference.model import Model, PackedBatch
from services.inference.staging import Staging
from shared.errors import ConfigurationError
from shared.networks.build import build_network
from shared.networks.interface import Network, NetworkInput, State
from shared.networks.precision import autocast
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from shared.telemetry import configure_logging

LEAF = LeafSpec(name="observation", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))


def make_spec(name: str = "impala_shallow", *, lstm_size: int = 0) -> RunSpec:
    return RunSpec(
        environment=EnvironmentSpec(observation=(LEAF,), num_actions=6),
        network=NetworkSpec(name=name, lstm_size=lstm_size, frame_stack=4),
        agent="vtrace",
        unroll=5,
        reward_clip=1.0,
    )


def make_input(rows: int, *, seed: int) -> NetworkInput:
    torch.manual_seed(seed)
    return NetworkInput(
        observation={"observation": torch.randint(256, (1, rows, 4, 84, 84), dtype=torch.uint8).cuda()},
        previous_action=torch.randint(6, (1, rows)).cuda(),
        previous_reward=torch.randn(1, rows).cuda(),
        is_first=torch.rand(1, rows).cuda() < 0.3,
    )


def test_graphs_on_another_device_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="cuda_graphs: there are none on device cpu"):
        InferenceConfig(device="cpu", cuda_graphs=True)
    with pytest.raises(ConfigurationError, match="cuda_graphs: there are none on device cpu"):
        GraphedNetwork(build_network(make_spec()), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("lstm_size", [0, 32])
@pytest.mark.parametrize("name", ["impala_shallow", "nature", "impala_deep"])
@torch.no_grad()
def test_graphs_compute_what_the_network_does_also_after_its_weights_changed(
    name: str, lstm_size: int
) -> None:
    device = torch.device("cuda")
    network = build_network(make_spec(name, lstm_size=lstm_size)).to(device).eval()
    graphed = GraphedNetwork(network, device)
    for change in range(2):
        for parameter in network.parameters():
            parameter.add_(0.01 * change)
        with autocast("bfloat16", device, network):
            state = {rows: network.initial_state(rows) for rows in (4, 7)}
            for seed in range(4):
                for rows in (4, 7):
                    inputs = make_input(rows, seed=seed)
                    (expected, after), (output, next_state) = (
                        network(inputs, state[rows]),
                        graphed(inputs, state[rows]),
                    )
                    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
                    torch.testing.assert_close(next_state, after, rtol=0.02, atol=0.02)
                    state[rows] = after
    assert graphed.captured == {4, 7}


class Asking(Network):
    """Waits for its device, which no graph can."""

    def initial_state(self, batch_size: int) -> State:
        return ()

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Tensor, State]:  # type: ignore[override]
        return inputs.previous_reward * float(inputs.previous_reward.sum()), state


@pytest.mark.gpu
@torch.no_grad()
def test_a_network_that_cannot_be_captured_is_computed_without_graphs_and_logged_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("info", "json", "test")
    network = Asking()
    graphed = GraphedNetwork(network, torch.device("cuda"))
    for seed in range(3):
        inputs = make_input(5, seed=seed)
        torch.testing.assert_close(graphed(inputs, ())[0], network(inputs, ())[0])
    said = "".join(capsys.readouterr())
    assert said.count("network cannot be captured as a CUDA graph") == 1
    assert graphed.captured == frozenset()
    torch.rand(1, device="cuda")  # nothing is left as in a capture


@pytest.mark.gpu
def test_a_model_with_graphs_answers_as_one_without() -> None:
    spec = make_spec(lstm_size=32)
    torch.manual_seed(0)
    weights = build_network(spec).state_dict()
    answers = []
    for cuda_graphs in (False, True):
        model = Model(
            spec,
            build_network(spec),
            device=torch.device("cuda"),
            precision="float32",
            seed=0,
            cuda_graphs=cuda_graphs,
        )
        model.load(weights, version=1, update=1)
        answers.append([model.run(make_batch(spec, t)) for t in range(5)])
        model.load({name: 1.1 * leaf for name, leaf in weights.items()}, version=2, update=2)
        answers[-1] += [model.run(make_batch(spec, t)) for t in range(5, 10)]
        assert not cuda_graphs or model._forward.captured == {6}
        model.close()
    for plain, graphed in zip(*answers, strict=True):
        np.testing.assert_allclose(graphed.logits, plain.logits, rtol=1e-3, atol=1e-4)
        assert plain.start is not None
        assert graphed.start is not None
        for before, same in zip(plain.start.state, graphed.start.state, strict=True):
            np.testing.assert_allclose(same, before, rtol=1e-3, atol=1e-4)


def make_batch(spec: RunSpec, t: int) -> PackedBatch:
    """Six greedy rows in scattered slots, whose ChunkStarts are wanted."""
    random = np.random.default_rng(t)
    staging = Staging(spec.environment, rows=6, pinned=True)
    step = StepArrays(
        observation={"observation": random.integers(256, size=(6, 84, 84), dtype=np.uint8)},
        reward=random.normal(size=6).astype(np.float32),
        terminated=np.zeros(6, np.bool_),
        truncated=np.zeros(6, np.bool_),
        is_first=np.full(6, t == 0) | (random.random(6) < 0.2),
    )
    staging.place(0, step, slots=np.array([0, 1, 2, 7, 8, 4]), greedy=True, epsilon=np.zeros(6))
    return PackedBatch(staging, 6, np.arange(6))
