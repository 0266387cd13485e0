import pytest
import torch
from torch import Tensor

from services.inference.config import InferenceConfig
from services.inference.engine import Engine
from services.inference.graphs import GraphedNetwork
from services.inference.metrics import InferenceMetrics
from services.inference.model_thread import ModelThread
from shared.errors import ConfigurationError
from shared.http import new_registry
from shared.networks.build import build_network
from shared.networks.interface import Network, NetworkInput, State
from shared.networks.precision import autocast
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

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


async def test_graphs_on_another_device_are_refused_in_words() -> None:
    config = InferenceConfig(device="cpu", cuda_graphs=True)
    async with ModelThread(beat=lambda: None) as thread:
        with pytest.raises(ConfigurationError, match="cuda_graphs: there are none on device cpu"):
            await Engine.built(make_spec(), config, thread=thread, metrics=InferenceMetrics(new_registry()))


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


class Asking(Network):
    """Waits for its device, which no graph can."""

    def initial_state(self, batch_size: int) -> State:
        return ()

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Tensor, State]:  # type: ignore[override]
        return inputs.previous_reward * float(inputs.previous_reward.sum()), state


@pytest.mark.gpu
@torch.no_grad()
def test_a_network_that_cannot_be_captured_is_computed_without_graphs() -> None:
    network = Asking()
    graphed = GraphedNetwork(network, torch.device("cuda"))
    for seed in range(3):
        inputs = make_input(5, seed=seed)
        torch.testing.assert_close(graphed(inputs, ())[0], network(inputs, ())[0])
