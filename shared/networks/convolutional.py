"""What the image networks share: a convolutional trunk per image, a small MLP for the rest, the heads."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import ConfigurationError
from shared.networks.cores import CoreAndHeads, orthogonal
from shared.networks.interface import Network, NetworkInput, Output, State
from shared.networks.leaves import FlatLeaves, pixels, scale
from shared.networks.pictures import Picture, is_image, is_image_for, picture
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec

VECTOR_FEATURES = 64
_BLOCK = 4  # pixels that one int32 holds


class Trunk(nn.Module):
    """Pixels [N, C, H, W] in any dtype to `features` values [N, features]."""

    features: int


class ImageNetwork(Network):
    """A trunk per image; leaves that are none, or too small for the trunk, go through a small MLP."""

    name: str
    smallest: int  # pixels of the shorter side that the convolutions need

    def __init__(
        self, *, environment: EnvironmentSpec, network: NetworkSpec, agent: Agent = "vtrace"
    ) -> None:
        super().__init__()
        images = [leaf for leaf in environment.observation if self.fits(leaf)]
        if not images:
            raise ConfigurationError(_no_image(self.name, self.smallest, environment))
        self._images = images
        self.trunks = nn.ModuleList(self._trunk(leaf, network.frame_stack) for leaf in images)
        features = sum(trunk.features for trunk in self.trunks if isinstance(trunk, Trunk))
        vectors = [leaf for leaf in environment.observation if leaf not in images]
        self.vectors: nn.Sequential | None = None
        if vectors:
            flat = FlatLeaves(vectors, network.frame_stack)
            self.vectors = nn.Sequential(
                flat,
                nn.Linear(flat.size, VECTOR_FEATURES),
                nn.ReLU(),
                nn.Linear(VECTOR_FEATURES, VECTOR_FEATURES),
                nn.ReLU(),
            )
            features += VECTOR_FEATURES
        self.recurrent = CoreAndHeads(
            features,
            environment.num_actions,
            network.lstm_size,
            agent=agent,
            dueling_size=network.dueling_size,
        )

    @classmethod
    def fits(cls, leaf: LeafSpec) -> bool:
        """Whether `leaf` is an image large enough for the convolutions."""
        return is_image_for(leaf, cls.smallest)

    @abstractmethod
    def build_trunk(self, shape: Picture, pixel_scale: float) -> Trunk:
        """The trunk of an image of `shape` (frame stack included in its channels)."""

    def initial_state(self, batch_size: int) -> State:
        """Zeros; empty without an LSTM."""
        return self.recurrent.initial_state(batch_size)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        """See `Network`."""
        steps, batch = inputs.is_first.shape
        observation = {name: leaf.flatten(0, 1) for name, leaf in inputs.observation.items()}
        parts = [
            trunk(pixels(leaf, observation[leaf.name]))
            for leaf, trunk in zip(self._images, self.trunks, strict=True)
        ]
        if self.vectors is not None:
            parts.append(self.vectors(observation))
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        output, state = self.recurrent(features.unflatten(0, (steps, batch)), inputs, state)
        return output, state

    def _trunk(self, leaf: LeafSpec, frame_stack: int) -> Trunk:
        channels, height, width = picture(leaf)
        return self.build_trunk(Picture(channels * frame_stack, height, width), scale(leaf))


class PixelConv2d(nn.Conv2d):
    """A first convolution that takes pixels in their own dtype and scales them.

    The few weights are scaled instead of the many pixels, and uint8 goes straight to the compute dtype
    (bfloat16 holds 0 … 255 exactly): that took 15 % off inference with the shallow network. With a stride of
    4, as in Atari's networks, 4×4 pixels of a channel become 16 channels of a picture a fourth as wide and
    high, and the same sum is a small dense convolution, in channels_last from there on.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        padding: int = 0,
        pixel_scale: float,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride, padding)
        self._pixel_scale = pixel_scale
        self._memory_format = memory_format

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gives it
        """[N, C, H, W] of any dtype."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        weight = self.weight * self._pixel_scale if self._pixel_scale != 1.0 else self.weight
        if self._takes_blocks(input):
            blocks = _pixel_blocks(input)
            return functional.conv2d(blocks.to(dtype).movedim(-1, 1), _weight_blocks(weight), self.bias)
        values = input.to(dtype, memory_format=self._memory_format)
        return functional.conv2d(values, weight, self.bias, self.stride, self.padding)

    def _takes_blocks(self, pixels: Tensor) -> bool:
        """Whether the kernel consists of whole blocks, and the rows of `pixels` of whole words."""
        kernels = {side % _BLOCK for side in self.kernel_size}
        *strides, last = pixels.stride()
        words = {length % _BLOCK for length in (*strides, pixels.shape[-1], pixels.storage_offset())}
        return (
            pixels.dtype == torch.uint8
            and self.stride == (_BLOCK, _BLOCK)
            and self.padding == (0, 0)
            and kernels == words == {0}
            and last == 1
        )


def _pixel_blocks(pixels: Tensor) -> Tensor:
    """uint8 [N, C, H, W] to [N, H/4, W/4, C·4·4]: whole rows first, then words of four pixels move."""
    count, channels, height, width = pixels.shape
    down, across = height // _BLOCK, width // _BLOCK
    words = pixels[:, :, : down * _BLOCK].view(torch.int32).reshape(count, channels, down, _BLOCK, across)
    rows = words.transpose(1, 2).reshape(count, down, channels * _BLOCK, across)
    return rows.transpose(2, 3).contiguous().view(torch.uint8)


def _weight_blocks(weight: Tensor) -> Tensor:
    """Weights [O, C, H, W] for what `_pixel_blocks` makes of pixels: [O, C·4·4, H/4, W/4]."""
    out, channels, height, width = weight.shape
    down, across = height // _BLOCK, width // _BLOCK
    blocks = weight.reshape(out, channels, down, _BLOCK, across, _BLOCK).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(out, -1, down, across).contiguous(memory_format=torch.channels_last)


class ConvolutionTrunk(Trunk):
    """Unpadded convolutions, given as (channels, kernel, stride), and a dense layer; ReLU after each."""

    def __init__(
        self, shape: Picture, pixel_scale: float, *, layers: Sequence[tuple[int, int, int]], dense: int
    ) -> None:
        super().__init__()
        channels, height, width = shape
        modules: list[nn.Module] = []
        for out, kernel, stride in layers:
            modules += [
                nn.Conv2d(channels, out, kernel, stride)
                if modules
                else PixelConv2d(channels, out, kernel=kernel, stride=stride, pixel_scale=pixel_scale),
                nn.ReLU(inplace=True),
            ]
            channels = out
            height, width = ((side - kernel) // stride + 1 for side in (height, width))
        self.features = dense
        self.layers = nn.Sequential(
            *modules, nn.Flatten(), nn.Linear(channels * height * width, dense), nn.ReLU(inplace=True)
        )
        # torch's own initialization shrinks the signal about twofold per layer: on Pong, nothing was learned.
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                orthogonal(layer, gain=math.sqrt(2))

    def forward(self, values: Tensor) -> Tensor:
        """[N, C, H, W] to [N, dense]."""
        features: Tensor = self.layers(values)
        return features


def _no_image(name: str, smallest: int, environment: EnvironmentSpec) -> str:
    images = [leaf for leaf in environment.observation if is_image(leaf)]
    if images:
        return (
            f"network {name} needs an image of at least {smallest}×{smallest} pixels, "
            f"not {'; '.join(map(str, images))}: choose mlp or impala_deep"
        )
    leaves = "; ".join(map(str, environment.observation))
    return f"network {name} needs an image (uint8, bool or floats with 2 or 3 axes), not {leaves}: choose mlp"
