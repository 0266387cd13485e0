"""The deep residual network of IMPALA (Espeholt et al. 2018, figure 3 right)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.networks.convolutional import ImageNetwork, PixelConv2d, Trunk
from shared.networks.pictures import Picture
from shared.specs import Agent, EnvironmentSpec, NetworkSpec

_SECTIONS = (16, 32, 32)
_BLOCKS = 2
_DENSE = 256


class ImpalaDeepNetwork(ImageNetwork):
    """Sections of 16, 32 and 32 channels with two residual blocks each and 256 dense units per image.

    Its weights lie in channels_last, in which its convolutions are about twice as fast.
    """

    name = "impala_deep"
    smallest = 1

    def __init__(
        self, *, environment: EnvironmentSpec, network: NetworkSpec, agent: Agent = "vtrace"
    ) -> None:
        super().__init__(environment=environment, network=network, agent=agent)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.to(memory_format=torch.channels_last)

    def build_trunk(self, shape: Picture, pixel_scale: float) -> Trunk:
        """See `ImageNetwork`."""
        return ResidualTrunk(shape, pixel_scale)


class ResidualTrunk(Trunk):
    """Per section a 3×3 convolution, a 3×3/2 maximum pool and residual blocks; then a dense layer."""

    def __init__(self, shape: Picture, pixel_scale: float) -> None:
        super().__init__()
        channels, height, width = shape
        modules: list[nn.Module] = []
        for out in _SECTIONS:
            modules += [
                nn.Conv2d(channels, out, 3, padding=1)
                if modules
                else PixelConv2d(
                    channels,
                    out,
                    kernel=3,
                    stride=1,
                    padding=1,
                    pixel_scale=pixel_scale,
                    memory_format=torch.channels_last,
                ),
                MaxPool(),
                *(ResidualBlock(out) for _ in range(_BLOCKS)),
            ]
            channels = out
            height, width = (height + 1) // 2, (width + 1) // 2
        self.features = _DENSE
        self.sections = nn.Sequential(*modules, nn.ReLU(inplace=True))
        self.dense = nn.Sequential(nn.Linear(channels * height * width, _DENSE), nn.ReLU(inplace=True))

    def forward(self, values: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 256]."""
        maps: Tensor = self.sections(values)
        features: Tensor = self.dense(maps.movedim(1, -1).flatten(1))  # a view of a channels_last tensor
        return features


class MaxPool(nn.Module):
    """The maximum of 3×3 values at every second place, as `nn.MaxPool2d(3, stride=2, padding=1)`.

    torch's looks for where each maximum came from, which nobody asks without gradients: on a CPU these
    four maxima of halves take half as long, a fifth of the network's forward pass.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, ⌈H/2⌉, ⌈W/2⌉]."""
        if torch.is_grad_enabled() or maps.device.type != "cpu":
            return functional.max_pool2d(maps, 3, stride=2, padding=1)
        return _halved(_halved(maps, 2), 3)


def _halved(maps: Tensor, axis: int) -> Tensor:
    """Along `axis`, the maximum of each value with an even index and its neighbours."""
    even = maps[_every_second(axis, 0)]
    odd = maps[_every_second(axis, 1)]
    halves = torch.empty_like(even, memory_format=torch.channels_last)
    pairs = odd.shape[axis]
    torch.maximum(even.narrow(axis, 0, pairs), odd, out=halves.narrow(axis, 0, pairs))
    if pairs < even.shape[axis]:
        halves.select(axis, -1).copy_(even.select(axis, -1))
    later = halves.narrow(axis, 1, halves.shape[axis] - 1)
    torch.maximum(later, odd.narrow(axis, 0, later.shape[axis]), out=later)
    return halves


def _every_second(axis: int, start: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, None, 2))


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """[N, C, H, W] of the same shape."""
        inner = self.first(maps.relu())
        added: Tensor = maps + self.second(inner.relu_())
        return added
