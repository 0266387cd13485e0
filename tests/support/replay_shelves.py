"""A replay's shelf without its service: small ones, and messages for them."""

from dataclasses import replace
from typing import Any

import numpy as np

from services.replay.config import ReplayConfig
from services.replay.shelf import Shelf, ShelfState
from shared.wire.chunk_rows import Rows, split_message
from shared.wire.chunks import encode_chunk
from tests.support.replay_runs import SETTINGS, UNROLL, make_chunk

# Every row of every chunk is an item.
_SHELF = {**SETTINGS, "burn_in": 0, "sequence_length": UNROLL}


def shelf_config(**settings: Any) -> ReplayConfig:
    """A configuration of a shelf where every row of every chunk is an item, unless `settings` say else."""
    return ReplayConfig(**{**_SHELF, **settings})


def shelf_of(state: ShelfState | None = None, *, seed: int = 1, **settings: Any) -> Shelf:
    """A shelf that starts empty or goes on from `state`."""
    return Shelf(shelf_config(**settings), seed=seed, state=state)


class Messages:
    """The consecutive messages of one stream; its chunks differ in number and TD errors only."""

    def __init__(self, stream_id: str = "stream", *, rows: int = 2) -> None:
        self.number = 0
        self._rows = split_message(encode_chunk(make_chunk("run", stream_id, 0, rows=rows)))

    def next(self, td_error: float | None = None) -> Rows:
        """The next one; `td_error` of all steps, else as it happens."""
        number, self.number = self.number, self.number + 1
        errors = self._rows.td_errors if td_error is None else np.full_like(self._rows.td_errors, td_error)
        return self._rows._replace(
            header=replace(self._rows.header, number=number),
            records=[
                b"%d/%d " % (number, row) + record[:32] for row, record in enumerate(self._rows.records)
            ],
            td_errors=errors,
        )
