"""From a message's bytes to rows that belong to this run; knows neither queue nor table."""

from shared.belonging import check_belongs
from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.wire.chunk_rows import Rows

_LARGEST = 2**62  # what follows it is an int64 too


def check_rows(rows: Rows, spec: RunSpec, *, run_id: str) -> None:
    """Raises ChunkError, in words, for rows that were not cut for this run or that no learner can use."""
    check_belongs(rows.outline, spec, run_id=run_id)
    header = rows.header
    if max(header.number, header.first_row) > _LARGEST:
        raise ChunkError(f"its number {header.number} or first row {header.first_row} is beyond {_LARGEST}")
