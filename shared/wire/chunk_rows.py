"""One row of an R2D2 chunk as a record of its own: what replay stores, without ever looking into the frames.

    offset 0   4 bytes  magic "SRLR"
           4   uint32   format version
           8   uint32   length of the JSON head in bytes
          12   uint32   CRC-32 of the JSON head
          16            the JSON head
    data begins at the next multiple of 8

Raw arrays come first, those of wide items before those of narrow ones, so that without any padding all of
them are aligned; then, in the order of the fields, what is compressed: the frames that arrived. The head says
what is particular to this row, in as few bytes as it can (`_Head`); names, dtypes and shapes of the fields
that every chunk has follow from it. `shared.wire.chunks` knows what the fields mean.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields, replace
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from shared.errors import ChunkError
from shared.types import Array, Chunk, ChunkHeader
from shared.wire.chunks import CHUNK_FORMAT_VERSION, StateShapes, chunk_of, row_layout
from shared.wire.fields import RAW, ZSTD_ROWS, Frames, Layout, array_of, check_layout, damage, stored_fields

RECORD_FORMAT_VERSION = 1
ALIGNMENT = 8
"""Of a record in memory, for its arrays to be aligned."""

_PREFIX = struct.Struct("<4sIII")
_MAGIC = b"SRLR"
_MAX_HEAD_BYTES = 2**20
_HEADER = tuple(field.name for field in fields(ChunkHeader))


class Rows(NamedTuple):
    """A message of `R` rows, taken apart."""

    header: ChunkHeader
    outline: Chunk  # views of the message, as are the last two; what is compressed has no values but a shape
    records: list[bytes]  # [R]
    td_errors: NDArray[np.float32]  # [R, T]
    reset_steps: NDArray[np.bool_]  # [R, T]


class _Head(NamedTuple):
    """What a record's JSON head says, as a list in this order."""

    header: list[Any]  # the chunk header's values
    unroll: int  # T
    history: int  # S − 1
    leaves: Sequence[Layout]  # of each observation leaf: name, dtype and shape of one environment's value
    state: StateShapes
    weights: list[list[int]]  # consecutive steps under the same weights: how many, version, update
    frames: dict[str, int]  # bytes of each field that is compressed


def split_message(data: bytes | memoryview) -> Rows:
    """The rows of the chunk in `data`, as it arrived; what is compressed is taken over as it is.

    Raises ChunkError as `decode_chunk` does, and on a chunk without TD errors. Damage within a compressed
    frame is not seen here but in `chunk_of_record`.
    """
    meta, stored = stored_fields(CHUNK_FORMAT_VERSION, data)
    frames = {name: field for name, field in stored.items() if isinstance(field, Frames)}
    for name in frames:
        if not name.startswith(("observation/", "history/")):
            raise ChunkError(f"chunk field {name!r} is compressed")
    arrays = {
        name: _shape_only(field) if isinstance(field, Frames) else field for name, field in stored.items()
    }
    chunk = chunk_of(meta, arrays)
    if chunk.td_errors is None:
        raise ChunkError("chunk has no td_errors; replay takes only those of R2D2")
    return Rows(
        header=chunk.header,
        outline=chunk,
        records=list(_records(chunk, arrays, frames)),
        td_errors=chunk.td_errors,
        reset_steps=chunk.reset_steps,
    )


def chunk_of_record(record: bytes | memoryview) -> Chunk:
    """The chunk of one row: bit for bit `slice_rows(decode_chunk(message), r, r + 1)`.

    Arrays stored raw are read-only views of `record`. Raises ChunkError, and nothing else, on anything that
    is no record. Safe to call from several threads at once.
    """
    view = memoryview(record).cast("B").toreadonly()
    with damage():
        head, data = _parsed(view)
        layout = row_layout(head.unroll, head.leaves, head.history, head.state)
        check_layout(layout)
        # Only now is it known that T is no number too large to set memory aside for.
        counts, versions, updates = _columns(head)
        arrays = {
            "weights_version": np.repeat(versions, counts),
            "weights_update": np.repeat(updates, counts),
        }
        stored = dict(_decoded(layout, head.frames, data))
        arrays |= {name: stored[name] for name, _, _ in layout}
        return chunk_of(dict(zip(_HEADER, head.header, strict=True)), arrays)


def _records(chunk: Chunk, arrays: dict[str, Array], frames: dict[str, Frames]) -> Iterator[bytes]:
    leaves = [(name, leaf.dtype.name, leaf.shape[2:]) for name, leaf in chunk.observation.items()]
    state = [(leaf.shape[1:], leaf.dtype.name) for leaf in chunk.state]
    history = next(iter(chunk.history.values())).shape[1] if chunk.history else 0
    weights = _runs(chunk.weights_version, chunk.weights_update)
    layout = _stored_order(row_layout(chunk.unroll, leaves, history, state), frames)
    raw = [arrays[name].reshape(chunk.rows, -1).view(np.uint8) for name, _, _ in layout if name not in frames]
    packed = [(name, frames[name].rows) for name, _, _ in layout if name in frames]
    for row in range(chunk.rows):
        header = replace(chunk.header, first_row=chunk.header.first_row + row)
        sizes = {name: len(rows[row]) for name, rows in packed}
        head = _Head(list(astuple(header)), chunk.unroll, history, leaves, state, weights, sizes)
        yield b"".join(
            [_opening(head), *(array[row].data for array in raw), *(rows[row] for _, rows in packed)]
        )


def _opening(head: _Head) -> bytes:
    text = orjson.dumps(tuple(head))
    return b"".join(
        (
            _PREFIX.pack(_MAGIC, RECORD_FORMAT_VERSION, len(text), zlib.crc32(text)),
            text,
            bytes(-(_PREFIX.size + len(text)) % ALIGNMENT),
        )
    )


def _parsed(view: memoryview) -> tuple[_Head, memoryview]:
    magic, version, size, checksum = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise ChunkError(f"not a record of replay: begins with {magic!r}")
    if version != RECORD_FORMAT_VERSION:
        raise ChunkError(f"record has format version {version}, this is {RECORD_FORMAT_VERSION}")
    end = _PREFIX.size + size
    start = end + -end % ALIGNMENT
    if size > _MAX_HEAD_BYTES or start > len(view):
        raise ChunkError(f"not a record of replay: a head of {size} bytes in {len(view)}")
    text = view[_PREFIX.size : end]
    if zlib.crc32(text) != checksum:
        raise ChunkError("record is damaged: the checksum of its head does not match")
    return _Head(*orjson.loads(text)), view[start:]


def _decoded(layout: list[Layout], frames: dict[str, int], data: memoryview) -> Iterator[tuple[str, Array]]:
    begin = 0
    for name, dtype, shape in _stored_order(layout, frames):
        size = frames.get(name, np.dtype(dtype).itemsize * math.prod(shape))
        if type(size) is not int or not 0 < size <= len(data) - begin:
            raise ChunkError(
                f"record field {shown(name)} of {shown(size)} bytes does not fit its {len(data)}"
            )
        codec = ZSTD_ROWS if name in frames else RAW
        head = {"name": name, "dtype": dtype, "shape": shape, "codec": codec, "sizes": [size]}
        yield name, array_of(head, data[begin : begin + size])
        begin += size
    if begin != len(data):
        raise ChunkError(f"record has {len(data)} bytes of data, its fields take {begin}")


def _stored_order(layout: list[Layout], frames: Any) -> list[Layout]:
    """Raw before compressed, wide items before narrow ones."""
    return sorted(layout, key=lambda field: (field[0] in frames, -np.dtype(field[1]).itemsize))


def _runs(versions: NDArray[np.int64], updates: NDArray[np.int64]) -> list[list[int]]:
    """How many consecutive steps have the same version and update, with these."""
    changes = np.flatnonzero((np.diff(versions) != 0) | (np.diff(updates) != 0)) + 1
    starts = np.concatenate([[0], changes])
    counts = np.diff(np.append(starts, len(versions)))
    return [
        list(run)
        for run in zip(counts.tolist(), versions[starts].tolist(), updates[starts].tolist(), strict=True)
    ]


def _columns(head: _Head) -> tuple[Array, Array, Array]:
    """Counts, versions and updates of the runs."""
    runs = head.weights
    if any(type(value) is not int for run in runs for value in run) or any(run[0] < 1 for run in runs):
        raise ChunkError(f"record has weights {shown(runs)}")
    if sum(run[0] for run in runs) != head.unroll:
        raise ChunkError(f"record has weights of other than {head.unroll} steps")
    columns = np.array(runs, np.int64).reshape(len(runs), 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _shape_only(frames: Frames) -> Array:
    """An array of that shape that takes no memory; its values mean nothing."""
    return np.broadcast_to(np.zeros((), frames.dtype), frames.shape)
