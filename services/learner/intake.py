"""From a message's bytes to a chunk that this run's network can be trained on."""

from collections.abc import Mapping, Sequence

import numpy as np

from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Array, Chunk

StateLayout = Sequence[tuple[int, ...]]
"""Shape of one environment's value, for each leaf of the network's recurrent state (float32)."""


def check_chunk(chunk: Chunk, spec: RunSpec, state: StateLayout, *, run_id: str) -> None:
    """Raises ChunkError, in words, when `chunk` was not cut for this run, its network and its unroll."""
    header = chunk.header
    if header.run_id != run_id:
        raise ChunkError(f"it belongs to run {header.run_id!r}")
    if header.network_hash != spec.network_hash:
        raise ChunkError(f"its network is {header.network_hash!r}, the run's is {spec.network_hash!r}")
    if chunk.unroll != spec.unroll:
        raise ChunkError(f"it has {chunk.unroll} steps, the run's unroll is {spec.unroll}")
    actions = spec.environment.num_actions
    if spec.agent == "r2d2":
        if chunk.td_errors is None:
            raise ChunkError("it has no TD errors, which chunks of an R2D2 run have")
    elif chunk.behaviour_logits is None:
        raise ChunkError("it has no logits, which chunks of a V-trace run have")
    elif (logits := chunk.behaviour_logits.shape[-1]) != actions:
        raise ChunkError(f"it has logits of {logits} actions, the run has {actions}")
    for name, values in (("action", chunk.action), ("previous_action", chunk.previous_action)):
        if values.min() < 0 or values.max() >= actions:
            raise ChunkError(f"{name} is not within 0 … {actions - 1}")
    _check_leaves("observation", chunk.observation, spec, chunk.unroll + 1)
    stack = spec.network.frame_stack
    if stack > 1 or chunk.history:
        _check_leaves("history", chunk.history, spec, stack - 1)
    shapes = [leaf.shape[1:] for leaf in chunk.state]
    if shapes != [tuple(shape) for shape in state] or any(leaf.dtype != np.float32 for leaf in chunk.state):
        raise ChunkError(f"its recurrent state has leaves {shapes}, the network's has {list(state)}")


def _check_leaves(what: str, leaves: Mapping[str, Array], spec: RunSpec, frames: int) -> None:
    expected = {
        leaf.name: (np.dtype(leaf.dtype), (frames, *leaf.shape)) for leaf in spec.environment.observation
    }
    got = {name: (leaf.dtype, leaf.shape[1:]) for name, leaf in leaves.items()}
    if got != expected:
        raise ChunkError(f"its {what} is {_words(got)}, the run's is {_words(expected)}")


def _words(leaves: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}: {dtype}{list(shape)}" for name, (dtype, shape) in leaves.items()) or "absent"
