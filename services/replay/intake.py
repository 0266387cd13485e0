"""From a message's bytes to rows that belong to this run; knows neither queue nor table."""

import numpy as np

from shared.belonging import check_belongs
from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.wire.chunk_rows import Rows


def check_rows(rows: Rows, spec: RunSpec, *, run_id: str) -> None:
    """Raises ChunkError, in words, for rows that were not cut for this run or that no learner can use."""
    check_belongs(rows.outline, spec, run_id=run_id)
    if not np.isfinite(rows.td_errors).all():
        raise ChunkError("its td_errors are not finite")
