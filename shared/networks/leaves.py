"""From observation leaves to what layers take: pictures [N, C, H, W] and one flat vector [N, F]."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shared.networks.pictures import channels_first, is_image
from shared.specs import LeafSpec


def pixels(leaf: LeafSpec, values: Tensor) -> Tensor:
    """An image leaf [N, *shape] or, stacked, [N, S, *shape] as [N, S·C, H, W] in its own dtype.

    The channels are the first axis where only that one has 1, 3 or 4 elements, else the last; an image of
    two axes has one channel.
    """
    if values.dim() == len(leaf.shape) + 1:
        values = values.unsqueeze(1)
    if len(leaf.shape) == 2:
        return values
    if not channels_first(leaf):
        values = values.movedim(-1, 2)
    return values.flatten(1, 2)


def torch_dtype(name: str) -> torch.dtype:
    """The tensor dtype of a numpy dtype's name."""
    return torch.from_numpy(np.empty(0, name)).dtype


def scale(leaf: LeafSpec) -> float:
    """What a leaf's values are multiplied with: 1/255 for uint8 (1/high where the space says so), else 1."""
    return 1.0 / max(1.0, *leaf.high) if leaf.dtype == "uint8" else 1.0


class FlatLeaves(nn.Module):
    """All leaves given as one float32 vector: Discrete one-hot, others flattened; frame stacks flattened too.

    A uint8 image is told by its mean, its standard deviation and its pixels normalized with them: small
    ones hold symbols more often than brightness (MiniGrid uses 0 … 10 of 255), and such small inputs took a
    tanh layer several times as many updates to learn from.
    """

    def __init__(self, leaves: Sequence[LeafSpec], frame_stack: int) -> None:
        super().__init__()
        self._leaves = tuple(leaves)
        self.size = sum(_flat_size(leaf, frame_stack) for leaf in leaves)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """`observation`: leaf name -> [N, …] or [N, S, …]; result [N, size]."""
        return torch.cat([_flat(leaf, observation[leaf.name]) for leaf in self._leaves], dim=-1)


def one_hot(values: Tensor, n: int) -> Tensor:
    """Integers […] as float32 […, n]; without the range check of torch's, which waits for a GPU."""
    return (values.unsqueeze(-1) == torch.arange(n, device=values.device)).float()


def _flat_size(leaf: LeafSpec, frame_stack: int) -> int:
    return frame_stack * (leaf.n or math.prod(leaf.shape)) + (2 if _is_uint8_image(leaf) else 0)


def _flat(leaf: LeafSpec, values: Tensor) -> Tensor:
    if leaf.n:
        return one_hot(values, leaf.n).flatten(1)
    flat = values.reshape(len(values), -1).float() * scale(leaf)
    if not _is_uint8_image(leaf):
        return flat
    deviation, mean = torch.std_mean(flat, dim=1, correction=0, keepdim=True)
    return torch.cat([(flat - mean) / (deviation + 1e-3), mean, deviation], dim=1)


def _is_uint8_image(leaf: LeafSpec) -> bool:
    return is_image(leaf) and leaf.dtype == "uint8"
