"""Sequences as replay gives them, cut from a history that is known as a whole."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shared.specs import RunSpec
from shared.types import Chunk
from shared.wire.chunks import slice_rows
from tests.support.learner_history import History


def q_chunk(history: History, number: int, row: int, spec: RunSpec) -> Chunk:
    """Chunk `number` of one row, as a run of R2D2 has it."""
    chunk = slice_rows(history.chunk(number, spec), row, row + 1)
    errors = np.zeros((1, spec.unroll), np.float32)
    return replace(chunk, behaviour_logits=None, td_errors=errors)


def sequence(history: History, row: int, numbers: Sequence[int], spec: RunSpec) -> list[Chunk]:
    """The chunks `numbers` of one row."""
    return [q_chunk(history, number, row, spec) for number in numbers]
