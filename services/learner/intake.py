"""From a message's bytes to a chunk that this run's network can be trained on."""

from collections.abc import Sequence

import numpy as np

from shared.belonging import check_belongs
from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Chunk

StateLayout = Sequence[tuple[int, ...]]
"""Shape of one environment's value, for each leaf of the network's recurrent state (float32)."""


def check_chunk(chunk: Chunk, spec: RunSpec, state: StateLayout, *, run_id: str) -> None:
    """Raises ChunkError, in words, when `chunk` was not cut for this run, its network and its unroll."""
    check_belongs(chunk, spec, run_id=run_id)
    actions = spec.environment.num_actions
    if spec.agent == "r2d2":
        if chunk.td_errors is None:
            raise ChunkError("it has no TD errors, which chunks of an R2D2 run have")
    elif chunk.behaviour_logits is None:
        raise ChunkError("it has no logits, which chunks of a V-trace run have")
    elif (logits := chunk.behaviour_logits.shape[-1]) != actions:
        raise ChunkError(f"it has logits of {logits} actions, the run has {actions}")
    shapes = [leaf.shape[1:] for leaf in chunk.state]
    if shapes != [tuple(shape) for shape in state] or any(leaf.dtype != np.float32 for leaf in chunk.state):
        raise ChunkError(f"its recurrent state has leaves {shapes}, the network's has {list(state)}")
