"""Observation leaves as images, and the network that they want by default; knows no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shared.specs import EnvironmentSpec, LeafSpec

SHALLOW_LAYERS = ((16, 8, 4), (32, 4, 2))
"""Convolutions of IMPALA's shallow network: channels, kernel, stride."""

_COLOURS = (1, 3, 4)  # sizes that say which axis holds the channels


class Picture(NamedTuple):
    """How a leaf looks as an image."""

    channels: int
    height: int
    width: int


def is_image(leaf: LeafSpec) -> bool:
    """Whether a leaf is an image: uint8, bool or floating, with two or three axes."""
    kind = np.dtype(leaf.dtype)
    return leaf.n == 0 and len(leaf.shape) in (2, 3) and (kind.kind in "fb" or kind == np.uint8)


def picture(leaf: LeafSpec) -> Picture:
    """Channels and size of an image leaf; see `channels_first` for where the channels stand."""
    if len(leaf.shape) == 2:
        return Picture(1, *leaf.shape)
    if channels_first(leaf):
        return Picture(*leaf.shape)
    height, width, channels = leaf.shape
    return Picture(channels, height, width)


def channels_first(leaf: LeafSpec) -> bool:
    """Whether the first axis of an image leaf of three holds its channels: only that one has 1, 3 or 4."""
    return leaf.shape[0] in _COLOURS and leaf.shape[-1] not in _COLOURS


def smallest_side(layers: Sequence[tuple[int, int, int]]) -> int:
    """Pixels that convolutions (channels, kernel, stride) without padding need at least."""
    side = 1
    for _, kernel, stride in reversed(layers):
        side = (side - 1) * stride + kernel
    return side


def is_image_for(leaf: LeafSpec, smallest: int) -> bool:
    """Whether a leaf is an image of at least `smallest` pixels on its shorter side."""
    return is_image(leaf) and min(picture(leaf)[1:]) >= smallest


def resolved_network(name: str, environment: EnvironmentSpec) -> str:
    """`name`, or what `auto` stands for: impala_shallow for an image that it can take, else mlp."""
    if name != "auto":
        return name
    smallest = smallest_side(SHALLOW_LAYERS)
    fits = any(is_image_for(leaf, smallest) for leaf in environment.observation)
    return "impala_shallow" if fits else "mlp"
