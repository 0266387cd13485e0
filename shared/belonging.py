"""Whether a chunk was cut for this run, as far as everybody who takes chunks must know it."""

from collections.abc import Mapping

import numpy as np

from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Array, Chunk


def check_belongs(chunk: Chunk, spec: RunSpec, *, run_id: str) -> None:
    """Raises ChunkError, in words, for a chunk of another run, network, unroll or environment, and for one on
    which training would end in NaN.
    """
    header = chunk.header
    if header.run_id != run_id:
        raise ChunkError(f"it belongs to run {header.run_id!r}")
    if header.network_hash != spec.network_hash:
        raise ChunkError(f"its network is {header.network_hash!r}, the run's is {spec.network_hash!r}")
    if chunk.unroll != spec.unroll:
        raise ChunkError(f"it has {chunk.unroll} steps, the run's unroll is {spec.unroll}")
    actions = spec.environment.num_actions
    for name, values in (("action", chunk.action), ("previous_action", chunk.previous_action)):
        if values.min() < 0 or values.max() >= actions:
            raise ChunkError(f"{name} is not within 0 … {actions - 1}")
    _check_leaves("observation", chunk.observation, spec, chunk.unroll + 1)
    stack = spec.network.frame_stack
    if stack > 1 or chunk.history:
        _check_leaves("history", chunk.history, spec, stack - 1)
    for name in ("reward", "previous_reward", "behaviour_logits", "td_errors"):
        _check_finite(name, getattr(chunk, name))
    for leaf in chunk.state:
        _check_finite("state", leaf)


def _check_finite(name: str, values: Array | None) -> None:
    if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ChunkError(f"its {name} is not finite")


def _check_leaves(what: str, leaves: Mapping[str, Array], spec: RunSpec, frames: int) -> None:
    expected = {
        leaf.name: (np.dtype(leaf.dtype), (frames, *leaf.shape)) for leaf in spec.environment.observation
    }
    got = {name: (leaf.dtype, leaf.shape[1:]) for name, leaf in leaves.items()}
    if got != expected:
        raise ChunkError(f"its {what} is {_words(got)}, the run's is {_words(expected)}")


def _words(leaves: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]) -> str:
    return ", ".join(f"{name}: {dtype}{list(shape)}" for name, (dtype, shape) in leaves.items()) or "absent"
