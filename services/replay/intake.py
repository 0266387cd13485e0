"""From a message's bytes to rows that belong to this run; knows neither queue nor table."""

from collections.abc import Mapping

import numpy as np

from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Array
from shared.wire.chunk_rows import Rows


def check_rows(rows: Rows, spec: RunSpec, *, run_id: str) -> None:
    """Raises ChunkError, in words, for rows that were not cut for this run or that no learner can use."""
    chunk = rows.outline
    header = chunk.header
    if header.run_id != run_id:
        raise ChunkError(f"it belongs to run {header.run_id!r}")
    if header.network_hash != spec.network_hash:
        raise ChunkError(f"its network is {header.network_hash!r}, the run's is {spec.network_hash!r}")
    if chunk.unroll != spec.unroll:
        raise ChunkError(f"it has {chunk.unroll} steps, the run's unroll is {spec.unroll}")
    if not np.isfinite(rows.td_errors).all():
        raise ChunkError("its td_errors are not finite")
    actions = spec.environment.num_actions
    for name, values in (("action", chunk.action), ("previous_action", chunk.previous_action)):
        if values.min() < 0 or values.max() >= actions:
            raise ChunkError(f"{name} is not within 0 … {actions - 1}")
    _check_leaves("observation", chunk.observation, spec, chunk.unroll + 1)
    stack = spec.network.frame_stack
    if stack > 1 or chunk.history:
        _check_leaves("history", chunk.history, spec, stack - 1)


def _check_leaves(what: str, leaves: Mapping[str, Array], spec: RunSpec, frames: int) -> None:
    expected = {leaf.name: (leaf.dtype, (frames, *leaf.shape)) for leaf in spec.environment.observation}
    got = {name: (leaf.dtype.name, leaf.shape[1:]) for name, leaf in leaves.items()}
    if got != expected:
        raise ChunkError(f"its {what} is {got}, the run's is {expected}")
