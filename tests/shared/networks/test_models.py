"""What the built-in networks promise beyond the contract."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shared.networks.build import AVAILABLE, build_network
from shared.networks.contract import random_input
from shared.networks.convolutional import PixelConv2d
from shared.networks.impala_deep import ImpalaDeepNetwork, MaxPool
from shared.networks.interface import Network, NetworkInput
from shared.networks.pictures import smallest_side
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

SCREEN = LeafSpec(name="screen", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))
VECTOR = LeafSpec(name="vector", dtype="float32", shape=(4,), low=(-1.0,), high=(1.0,))


def build(name: str, *leaves: LeafSpec, num_actions: int = 6, **network: int) -> tuple[Network, RunSpec]:
    spec = RunSpec(
        environment=EnvironmentSpec(observation=leaves, num_actions=num_actions),
        network=NetworkSpec(name=name, **network),  # type: ignore[arg-type]
        agent="vtrace",
        unroll=20,
        reward_clip=1.0,
    )
    torch.manual_seed(0)
    return build_network(spec), spec


def inputs_for(spec: RunSpec, steps: int = 1, batch: int = 2) -> NetworkInput:
    generator = torch.Generator().manual_seed(0)
    return random_input(spec.environment, spec.network, steps=steps, batch=batch, generator=generator)


def shapes(network: nn.Module, kind: type[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, kind)]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "convolutions", "dense"),
    [
        ("impala_shallow", [(16, 4, 8, 8), (32, 16, 4, 4)], (256, 32 * 9 * 9)),
        ("nature", [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)], (512, 64 * 7 * 7)),
    ],
)
def test_layers_are_the_published_ones(
    name: str, convolutions: list[tuple[int, ...]], dense: tuple[int, ...]
) -> None:
    network, _ = build(name, SCREEN, frame_stack=4)
    assert shapes(network, nn.Conv2d) == convolutions
    assert shapes(network, nn.Linear)[0] == dense


def test_the_deep_network_has_fifteen_convolutions_in_three_sections() -> None:
    network, _ = build("impala_deep", SCREEN, frame_stack=4)
    convolutions = shapes(network, nn.Conv2d)
    assert [shape[0] for shape in convolutions] == [16] * 5 + [32] * 10
    assert shapes(network, nn.Linear)[0] == (256, 32 * 11 * 11)


def test_the_deep_network_computes_in_channels_last() -> None:
    network, spec = build("impala_deep", SCREEN, frame_stack=4)
    layouts: list[bool] = []

    def note(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, MaxPool)):
            module.register_forward_hook(note)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    copied = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    network.load_state_dict(copied)  # as weights arrive
    network(inputs_for(spec), ())
    assert isinstance(network, ImpalaDeepNetwork)
    assert len(layouts) == 18
    assert all(layouts)
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in convolutions)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_first_convolution_equals_a_convolution_of_scaled_pixels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = PixelConv2d(3, 5, kernel=4, stride=2, pixel_scale=1 / 255)
    values = torch.randint(0, 256, (2, 3, 12, 12)).to(dtype)
    expected = nn.functional.conv2d(values.float() / 255, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(values), expected)


@pytest.mark.parametrize(
    ("kernel", "height", "width", "in_blocks"),
    [(8, 84, 84, True), (8, 87, 92, True), (4, 15, 20, True), (8, 84, 83, False), (6, 84, 84, False)],
)
def test_a_first_convolution_with_a_stride_of_four_moves_blocks_of_pixels(
    kernel: int, height: int, width: int, in_blocks: bool
) -> None:
    torch.manual_seed(0)
    layer = PixelConv2d(3, 5, kernel=kernel, stride=4, pixel_scale=1 / 255)
    values = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    for pixels in (values, values[1:3], values[:, 1:].repeat(1, 2, 1, 1)[:, :3], values.flip(0)[::2]):
        result = layer(pixels)
        expected = nn.functional.conv2d(pixels.float() / 255, layer.weight, layer.bias, stride=4)
        torch.testing.assert_close(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last) is in_blocks
        gradients = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(result, layer.weight, gradients),
            torch.autograd.grad(expected, layer.weight, gradients),
            rtol=1e-4,
            atol=1e-4,
        )
    misaligned = values.flatten()[1 : 1 + 3 * height * width].view(1, 3, height, width)
    expected = nn.functional.conv2d(misaligned.float() / 255, layer.weight, layer.bias, stride=4)
    torch.testing.assert_close(layer(misaligned), expected)


def test_the_smallest_side_is_the_smallest_that_convolutions_can_take() -> None:
    for layers in (((16, 8, 4), (32, 4, 2)), ((32, 8, 4), (64, 4, 2), (64, 3, 1))):
        side = smallest_side(layers)
        for size, works in ((side, True), (side - 1, False)):
            for _, kernel, stride in layers:
                size = (size - kernel) // stride + 1
            assert (size >= 1) is works


def features_of(network: Network, spec: RunSpec) -> Callable[[NetworkInput], torch.Tensor]:
    return lambda inputs: network(inputs, network.initial_state(inputs.is_first.shape[1]))[0].baseline


@pytest.mark.parametrize("name", ["nature", "impala_shallow", "impala_deep"])
def test_a_vector_beside_an_image_and_an_image_beside_an_image_reach_the_output(name: str) -> None:
    second = LeafSpec(name="map", dtype="float32", shape=(3, 40, 50), low=(0.0,), high=(1.0,))
    small = LeafSpec(name="small", dtype="uint8", shape=(5, 5), low=(0.0,), high=(9.0,))
    network, spec = build(name, SCREEN, VECTOR, second, small)
    inputs = inputs_for(spec)
    baseline = features_of(network, spec)
    before = baseline(inputs)
    for leaf, value in inputs.observation.items():
        changed = inputs._replace(observation={**inputs.observation, leaf: torch.zeros_like(value)})
        assert not torch.allclose(before, baseline(changed), atol=1e-6), leaf


def test_without_an_lstm_the_mlps_value_error_does_not_move_the_policy() -> None:
    network, spec = build("mlp", VECTOR)
    output, _ = network(inputs_for(spec), ())
    output.baseline.sum().backward()
    moved = {key for key, value in network.named_parameters() if value.grad is not None}
    assert moved == {
        key for key in dict(network.named_parameters()) if "value_tower" in key or "baseline" in key
    }


def test_the_mlp_without_hidden_layers_is_linear() -> None:
    network, spec = build("mlp", VECTOR, hidden_sizes=())  # type: ignore[arg-type]
    assert shapes(network, nn.Linear) == [(6, 4), (1, 4)]
    network(inputs_for(spec), ())


@pytest.mark.parametrize("lstm_size", [0, 16])
@pytest.mark.parametrize("name", AVAILABLE)
def test_bfloat16_changes_results_little(name: str, lstm_size: int) -> None:
    network, spec = build(name, SCREEN, frame_stack=4, lstm_size=lstm_size)
    inputs = inputs_for(spec, steps=3)
    state = network.initial_state(2)
    expected, _ = network(inputs, state)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = network(inputs, state)
    torch.testing.assert_close(actual.baseline, expected.baseline, rtol=0.05, atol=0.05)
    torch.testing.assert_close(actual.policy_logits, expected.policy_logits, rtol=0.05, atol=0.002)


@pytest.mark.parametrize("size", [(84, 84), (21, 11), (2, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximum_pool_is_torchs_with_and_without_gradients(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    maps = torch.randn(3, 4, *size).to(dtype)
    expected = torch.nn.functional.max_pool2d(maps, 3, stride=2, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        arranged = maps.contiguous(memory_format=layout)
        with torch.no_grad():
            assert torch.equal(MaxPool()(arranged), expected)
        assert torch.equal(MaxPool()(arranged), expected)
