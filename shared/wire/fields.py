"""A container of named arrays with a JSON head; does not know what the arrays mean.

    offset 0   4 bytes  magic "SRLC"
           4   uint32   length of the JSON head in bytes
           8   uint32   CRC-32 of the JSON head
          12            the JSON head
    data begins at the next multiple of 64; each field at a multiple of 64 from there

All integers and arrays are little-endian. The head is `{"format_version", "meta", "fields"}`; a field is
`{"name", "dtype", "shape", "offset", "bytes", "codec"}`. Codec `raw` is the array in C order; with
`zstd_rows` every row (index of the first axis) is one zstandard frame and `sizes` lists their lengths.
"""

import math
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
import orjson
import zstandard

from shared.errors import ChunkError
from shared.types import Array
from shared.wire.limits import DTYPES, MAX_DIMENSIONS, MAX_LEAVES, MAX_MESSAGE_BYTES, MIB

ALIGNMENT = 64
RAW = "raw"
ZSTD_ROWS = "zstd_rows"

_PREFIX = struct.Struct("<4sII")
_MAGIC = b"SRLC"
_MAX_HEAD_BYTES = 4 * MIB
_MAX_FIELDS = 4 * MAX_LEAVES
_MAX_AXES = MAX_DIMENSIONS + 2  # rows and time stand before one environment's value
_LEVEL = -1  # a fifth to a third less time than 1, for frames a tenth larger
_MAX_WINDOW_BYTES = 8 * MIB  # level -1 uses 512 KiB; a frame that asks for more than this is hostile
_MIN_ROW_BYTES = 2048  # below, zstandard costs more time than the bytes it saves are worth
_MUST_SAVE = 0.1  # of a field's bytes, or it is stored raw

Layout = tuple[str, str, tuple[int, ...]]
"""Name, dtype name and shape of a field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One array to be written; `compress`: row by row if that pays."""

    name: str
    array: Array
    compress: bool = False


class Frames(NamedTuple):
    """An array that lies there compressed: one frame for each row, not looked into."""

    dtype: str
    shape: tuple[int, ...]
    rows: list[memoryview]


class _Codecs(threading.local):
    """Zstandard's contexts, one pair per thread: they are reused between calls but not thread-safe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)


_codecs = _Codecs()


def encode_fields(format_version: int, meta: Mapping[str, Any], fields: Sequence[Field]) -> bytes:
    """`meta` and `fields` as bytes. Raises ChunkError when their number, dtypes or sizes cannot travel."""
    check_layout([(field.name, field.array.dtype.name, field.array.shape) for field in fields])
    heads: list[dict[str, Any]] = []
    pieces: list[Any] = []
    end = 0
    for field in fields:
        array = field.array
        rows = _compressed(array) if field.compress else None
        stored = [_bytes_of(_little_endian(array))] if rows is None else rows
        offset, padding = _aligned(end)
        size = sum(map(len, stored))
        head = _head(field.name, array.dtype.name, array.shape, offset, size)
        heads.append(
            head if rows is None else {**head, "codec": ZSTD_ROWS, "sizes": [len(row) for row in rows]}
        )
        pieces += [padding, *stored]
        end = offset + size
    return b"".join([_opening(format_version, meta, heads), *pieces])


def raw_bytes(format_version: int, meta: Mapping[str, Any], layout: Sequence[Layout]) -> int:
    """Bytes of such a container when nothing is compressed; compression only ever makes it smaller."""
    heads: list[dict[str, Any]] = []
    end = 0
    for name, dtype, shape in layout:
        offset, _ = _aligned(end)
        size = np.dtype(dtype).itemsize * math.prod(shape)
        heads.append(_head(name, dtype, shape, offset, size))
        end = offset + size
    return len(_opening(format_version, meta, heads)) + end


def decode_fields(format_version: int, data: bytes | memoryview) -> tuple[Any, dict[str, Array]]:
    """The meta and the arrays by name: views of `data`, and new arrays where it was compressed.

    Raises ChunkError, and nothing else, on bytes that are no such container; before it sets memory aside it
    checks that all arrays together are within the limits.
    """
    with damage():
        head, data = _parsed(data, format_version)
        return head["meta"], {field["name"]: array_of(field, stored) for field, stored in _stored(head, data)}


def stored_fields(format_version: int, data: bytes | memoryview) -> tuple[Any, dict[str, Array | Frames]]:
    """The meta, and by name the arrays that are stored raw, the frames of those that are not; all views.

    Raises ChunkError as `decode_fields`, save for damage within a frame, which only decompressing shows.
    """
    fields: dict[str, Array | Frames] = {}
    with damage():
        head, data = _parsed(data, format_version)
        for field, stored in _stored(head, data):
            if field["codec"] == ZSTD_ROWS:
                shape, dtype = tuple(field["shape"]), np.dtype(field["dtype"])
                rows = list(_frames(field["sizes"], stored, shape, dtype))
                fields[field["name"]] = Frames(dtype.name, shape, rows)
            else:
                fields[field["name"]] = array_of(field, stored)
        return head["meta"], fields


@contextmanager
def damage() -> Iterator[None]:
    """Raises ChunkError where the block stumbles over bytes or JSON that are not what they should be."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, zstandard.ZstdError, struct.error) as error:
        raise ChunkError(f"not a chunk: {shown(error)}") from error


def read_meta(format_version: int, data: bytes | memoryview) -> Any:
    """Only the meta; of the arrays nothing is looked at. Raises ChunkError as `decode_fields`."""
    with damage():
        return _parsed(data, format_version)[0]["meta"]


def _head(name: str, dtype: str, shape: tuple[int, ...], offset: int, size: int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "offset": offset, "bytes": size, "codec": RAW}


def _opening(format_version: int, meta: Mapping[str, Any], heads: list[dict[str, Any]]) -> bytes:
    """Everything before the data."""
    try:
        head = orjson.dumps({"format_version": format_version, "meta": meta, "fields": heads})
    except TypeError as error:
        raise ChunkError(f"chunk header cannot be written as JSON: {error}") from error
    _, padding = _aligned(_PREFIX.size + len(head))
    return b"".join((_PREFIX.pack(_MAGIC, len(head), zlib.crc32(head)), head, padding))


def _parsed(data: bytes | memoryview, format_version: int) -> tuple[Any, memoryview]:
    """The JSON head, and the data behind it."""
    view = memoryview(data).cast("B")
    if len(view) < _PREFIX.size:
        raise ChunkError(f"not a chunk: {len(view)} bytes")
    magic, size, checksum = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise ChunkError(f"not a chunk: begins with {magic!r}")
    end = _PREFIX.size + size
    start, _ = _aligned(end)
    if size > _MAX_HEAD_BYTES or start > len(view):
        raise ChunkError(f"not a chunk: a header of {size} bytes in a message of {len(view)}")
    head = view[_PREFIX.size : end]
    if zlib.crc32(head) != checksum:
        raise ChunkError("chunk header is damaged: its checksum does not match")
    parsed = orjson.loads(head)
    if parsed["format_version"] != format_version:
        raise ChunkError(
            f"chunk has format version {shown(parsed['format_version'])}, this is {format_version}"
        )
    return parsed, view[start:]


def _stored(head: Any, data: memoryview) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Each field's own head and its bytes."""
    heads = head["fields"]
    check_layout([(head["name"], head["dtype"], tuple(head["shape"])) for head in heads])
    end = 0
    for head in heads:
        offset, _ = _aligned(end)
        size = head["bytes"]
        if head["offset"] != offset or type(size) is not int or not 0 <= size <= len(data) - offset:
            raise ChunkError(
                f"chunk field {shown(head['name'])} does not fit: offset {shown(head['offset'])}, "
                f"{shown(size)} bytes of {len(data)}"
            )
        end = offset + size
        yield head, data[offset:end]
    if end != len(data):
        raise ChunkError(f"chunk has {len(data)} bytes of data, its fields take {end}")


def array_of(head: Mapping[str, Any], stored: memoryview) -> Array:
    """The array that `head` describes: a view of `stored`, or a new array where it is compressed.

    The layout must have been checked. Raises ChunkError, and inside `damage` nothing else.
    """
    shape, dtype, codec = tuple(head["shape"]), np.dtype(head["dtype"]).newbyteorder("<"), head["codec"]
    if codec == ZSTD_ROWS:
        array = _decompressed(head["sizes"], stored, shape, dtype)
    elif codec != RAW:
        raise ChunkError(f"chunk field {shown(head['name'])}: unknown codec {shown(codec)}")
    elif len(stored) != dtype.itemsize * math.prod(shape):
        raise ChunkError(
            f"chunk field {shown(head['name'])} of shape {list(shape)} is stored in {len(stored)} bytes"
        )
    else:
        array = np.frombuffer(stored, dtype).reshape(shape)
    if dtype == np.bool_ and array.view(np.uint8).max() > 1:
        raise ChunkError(f"chunk field {shown(head['name'])} holds a bool that is neither 0 nor 1")
    return array


def check_layout(layout: Sequence[Layout]) -> None:
    """Raises ChunkError unless the fields are distinct, of known dtypes and together within the limits."""
    if len(layout) > _MAX_FIELDS:
        raise ChunkError(f"chunk has {len(layout)} fields, at most {_MAX_FIELDS} can travel")
    total = 0
    names = set()
    for name, dtype, shape in layout:
        if type(name) is not str or name in names:
            raise ChunkError(f"chunk field {shown(name)} is no text or stands there twice")
        if dtype not in DTYPES:
            raise ChunkError(
                f"chunk field {shown(name)} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}"
            )
        if not 1 <= len(shape) <= _MAX_AXES or any(type(size) is not int or size < 1 for size in shape):
            raise ChunkError(f"chunk field {shown(name)} has shape {shown(list(shape))}")
        names.add(name)
        total += np.dtype(dtype).itemsize * math.prod(shape)
    if total > MAX_MESSAGE_BYTES:
        raise ChunkError(f"chunk has {total} bytes of arrays, at most {MAX_MESSAGE_BYTES} can travel")


def _compressed(array: Array) -> list[Any] | None:
    """One frame per row, or None where that saves too little."""
    row_bytes = array[0].nbytes
    if row_bytes < _MIN_ROW_BYTES:
        return None
    data, stride = _memory(array)
    most = int(array.nbytes * (1 - _MUST_SAVE)) - 160 - 12 * len(array)  # what the head and alignment cost
    # The first row tells whether the others are worth the time.
    if len(array) > 1 and len(_codecs.compressor.compress(data[:row_bytes])) > most // len(array):
        return None
    segments = np.full((len(array), 2), row_bytes, "<u8")
    segments[:, 0] = np.arange(len(array)) * stride
    # One call without the interpreter lock for all rows: taking it back after each costs more than the work.
    frames = _codecs.compressor.multi_compress_to_buffer(
        zstandard.BufferWithSegments(data, segments.tobytes())
    )
    return [frames[row] for row in range(len(frames))] if frames.size() <= most else None


def _decompressed(sizes: Any, stored: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    frames = _frames(sizes, stored, shape, dtype)
    array: Array = np.empty(shape, dtype)
    rows = array.reshape(len(array), -1).view(np.uint8)
    for row, frame in zip(rows, frames, strict=True):
        if _codecs.decompressor.stream_reader(frame).readinto(row.data) != row.nbytes:
            raise ChunkError("a compressed row is truncated")
    return array


def _frames(
    sizes: Any, stored: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[memoryview]:
    """The frames in `stored`, one per row."""
    if not isinstance(sizes, list) or len(sizes) != shape[0] or sum(sizes) != len(stored):
        raise ChunkError(f"a compressed field's {shape[0]} rows do not take its {len(stored)} bytes")
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    begin = 0
    for size in sizes:
        if type(size) is not int or size < 1:
            raise ChunkError(f"a compressed row of {shown(size)} bytes")
        frame = stored[begin : begin + size]
        begin += size
        # The size that the frame itself declares is what zstandard would set aside, so it comes first.
        if zstandard.frame_content_size(frame) != row_bytes:
            raise ChunkError(f"a compressed row does not declare the {row_bytes} bytes that it should hold")
        yield frame


def _memory(array: Array) -> tuple[memoryview, int]:
    """Memory that holds the rows of `array`, little-endian, and how many bytes apart; not copied for gaps."""
    is_little = array.dtype == array.dtype.newbyteorder("<")
    if not is_little or not array[0].flags.c_contiguous or array.strides[0] < array[0].nbytes:
        array = _little_endian(array)
    first, stride = _bytes_of(array[0]), array.strides[0]
    size = (len(array) - 1) * stride + len(first)
    return np.lib.stride_tricks.as_strided(np.asarray(first), (size,), (1,)).data, stride


def _little_endian(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _aligned(end: int) -> tuple[int, bytes]:
    """Where the next field begins after `end`, and the padding in between."""
    padding = -end % ALIGNMENT
    return end + padding, bytes(padding)
