"""The messages between replay and who samples from it, as bytes; knows no NATS.

Requests are JSON, priorities a container of arrays. An answer to a request for sequences is one container of
arrays (keys, probabilities, how many chunks each sequence has, how long each record is), then the records,
each at a multiple of 8; it travels in parts, cut anywhere, as large as a message may be. All other answers
are JSON: `{"waiting": words}` and another to come, `{"done": …}`, `{"refused": words}` for good, or
`{"failed": words}` for now.
"""

import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as shown
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from shared.errors import ChunkError, ProtocolError
from shared.types import Array
from shared.wire.chunk_rows import ALIGNMENT
from shared.wire.fields import Field, decode_fields, encode_fields
from shared.wire.limits import MIB

REPLAY_FORMAT_VERSION = 1
MAX_BATCH_SIZE = 65_536
MAX_PRIORITIES = 2**20
MAX_ANSWER_BYTES = 2048 * MIB
MIN_PART_BYTES = 256

Verdict = Literal["waiting", "done", "refused", "failed"]

_CALL = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEAD_BYTES = struct.Struct("<Q")
_PART = struct.Struct("<4s16sI8sIIQ")  # magic, call, attempt, answer, part, parts, bytes of all parts
_MAGIC = b"SRRP"


class Request(NamedTuple):
    """`call` stays over all attempts of one call, so that a newer attempt can take the place of an older."""

    call: str  # 32 hexadecimal digits
    attempt: int
    value: int | str  # the batch size, or the snapshot's name


class SampleAnswer(NamedTuple):
    """`n` sequences with their records as they are stored."""

    keys: NDArray[np.uint64]  # [n]
    probabilities: NDArray[np.float64]  # [n]
    size: int  # N, items in the table
    rows: Sequence[Sequence[bytes | memoryview]]  # [n], the records of each sequence in order


class Answer(NamedTuple):
    """What an answer says that is not in parts."""

    verdict: Verdict
    value: Any


def encode_request(request: Request) -> bytes:
    """A request for a sample (a batch size) or a snapshot (a name)."""
    return orjson.dumps({"format_version": REPLAY_FORMAT_VERSION, **request._asdict()})


def decode_sample_request(data: bytes) -> Request:
    """A request whose value is a batch size. Raises ProtocolError."""
    request = _decoded_request(data)
    if type(request.value) is not int or not 1 <= request.value <= MAX_BATCH_SIZE:
        raise ProtocolError(
            f"a batch of {shown(request.value)} sequences; 1 to {MAX_BATCH_SIZE:,} are possible"
        )
    return request


def decode_snapshot_request(data: bytes) -> Request:
    """A request whose value is a snapshot's name. Raises ProtocolError."""
    request = _decoded_request(data)
    if type(request.value) is not str or not _NAME.fullmatch(request.value):
        raise ProtocolError(
            f"snapshot {shown(request.value)} is not named by 1 to 64 letters, digits, '_' or '-'"
        )
    return request


def encode_priorities(keys: Array, priorities: Array) -> bytes:
    """New priorities [n] of the items `keys` [n]. Raises ProtocolError unless they fit each other."""
    fields = [
        Field(name="keys", array=np.asarray(keys, np.uint64)),
        Field(name="priorities", array=np.asarray(priorities, np.float64)),
    ]
    _check_priorities(*(field.array for field in fields))
    return encode_fields(REPLAY_FORMAT_VERSION, {}, fields)


def decode_priorities(data: bytes) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Keys and priorities; what these say is not looked at. Raises ProtocolError."""
    _, arrays = _decoded_fields(
        "priorities", data, {"keys": ("uint64",), "priorities": ("float64", "float32")}
    )
    keys, priorities = arrays["keys"], arrays["priorities"].astype(np.float64)
    _check_priorities(keys, priorities)
    return keys, priorities


def encode_sample(answer: SampleAnswer) -> bytes:
    """The whole answer to a request for sequences. Raises ProtocolError when it cannot be one."""
    records = [record for sequence in answer.rows for record in sequence]
    fields: dict[str, Array] = {
        "keys": np.asarray(answer.keys, np.uint64),
        "probabilities": np.asarray(answer.probabilities, np.float64),
        "chunks": np.array([len(sequence) for sequence in answer.rows], np.uint32),
        "bytes": np.array([len(record) for record in records], np.uint32),
    }
    _check_sample(answer.size, fields)
    head = encode_fields(
        REPLAY_FORMAT_VERSION,
        {"size": answer.size},
        [Field(name=name, array=fields[name]) for name in fields],
    )
    pieces: list[bytes | memoryview] = [_HEAD_BYTES.pack(len(head)), *_padded(head)]
    for record in records:
        pieces += _padded(record)
    return b"".join(pieces)


def decode_sample(data: bytes | memoryview) -> SampleAnswer:
    """The answer whose parts, put together, are `data`; records are views of it. Raises ProtocolError."""
    view = memoryview(data).cast("B")
    if len(view) < _HEAD_BYTES.size:
        raise ProtocolError(f"not a sample: {len(view)} bytes")
    end = _HEAD_BYTES.size + _HEAD_BYTES.unpack_from(view)[0]
    if end > len(view):
        raise ProtocolError(f"not a sample: a head up to byte {end} of {len(view)}")
    dtypes = {"keys": ("uint64",), "probabilities": ("float64",), "chunks": ("uint32",), "bytes": ("uint32",)}
    meta, arrays = _decoded_fields("sample", view[_HEAD_BYTES.size : end], dtypes)
    size = meta.get("size")
    _check_sample(size, arrays)
    records = _cut(view, _aligned(end), arrays["bytes"].tolist())
    rows = [[next(records) for _ in range(count)] for count in arrays["chunks"].tolist()]
    return SampleAnswer(arrays["keys"], arrays["probabilities"], size, rows)


def parts_of(answer: bytes, request: Request, max_bytes: int) -> list[bytes]:
    """`answer` to `request` in messages of at most `max_bytes`. Raises ProtocolError."""
    room = max_bytes - _PART.size
    if max_bytes < MIN_PART_BYTES or not 0 < len(answer) <= MAX_ANSWER_BYTES:
        raise ProtocolError(f"an answer of {len(answer):,} bytes in messages of {max_bytes:,}")
    view = memoryview(answer)
    starts = range(0, len(answer), room)
    call, name = bytes.fromhex(request.call), secrets.token_bytes(8)
    return [
        b"".join(
            (
                _PART.pack(_MAGIC, call, request.attempt, name, part, len(starts), len(answer)),
                view[start : start + room],
            )
        )
        for part, start in enumerate(starts)
    ]


class Assembly:
    """Puts together the parts of one answer to one attempt: of that which came first, should there be two."""

    def __init__(self, request: Request) -> None:
        self._call = (bytes.fromhex(request.call), request.attempt)
        self._whole: tuple[bytes, int, int] | None = None  # the answer's name, parts, bytes
        self._pieces: dict[int, memoryview] = {}
        self._bytes = 0

    def add(self, message: bytes) -> bytes | None:
        """The whole answer, once `message` completes it. Raises ProtocolError on what is no part of it."""
        if not is_part(message) or len(message) < _PART.size:
            raise ProtocolError(f"not a part of an answer: {shown(bytes(message[:40]))}")
        _, call, attempt, name, part, parts, size = _PART.unpack_from(message)
        if (call, attempt) != self._call:
            return None
        self._whole = self._whole or (name, parts, size)
        if name != self._whole[0]:
            return None
        if (name, parts, size) != self._whole or part >= parts or not parts <= size <= MAX_ANSWER_BYTES:
            raise ProtocolError(f"part {part} of {parts}, {size} bytes in all, does not fit the others")
        if part in self._pieces:
            return None
        self._pieces[part] = memoryview(message)[_PART.size :]
        self._bytes += len(self._pieces[part])
        if self._bytes > size:
            raise ProtocolError(f"the parts of an answer of {size} bytes are longer than that")
        if len(self._pieces) < parts:
            return None
        if self._bytes != size:
            raise ProtocolError(f"the parts of an answer of {size} bytes are {self._bytes} long")
        return b"".join(self._pieces[number] for number in range(parts))


def is_part(message: bytes) -> bool:
    """Whether `message` is a part of a sample, not an answer in JSON."""
    return message[: len(_MAGIC)] == _MAGIC


def encode_answer(verdict: Verdict, value: Any) -> bytes:
    """An answer in JSON; numpy's numbers and arrays are taken for what they are."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return orjson.dumps({verdict: value}, option=options)


def decode_answer(data: bytes) -> Answer:
    """Raises ProtocolError on anything that is no answer in JSON."""
    try:
        raw = orjson.loads(data)
    except ValueError as error:
        raise ProtocolError(f"not an answer of replay: {shown(bytes(data[:40]))}") from error
    if not isinstance(raw, dict) or len(raw) != 1 or not raw.keys() <= set(get_args(Verdict)):
        raise ProtocolError(f"not an answer of replay: {shown(raw)}")
    ((verdict, value),) = raw.items()
    if verdict != "done" and type(value) is not str:
        raise ProtocolError(f"not an answer of replay: {verdict} without words")
    return Answer(verdict, value)


def _decoded_request(data: bytes) -> Request:
    try:
        raw = orjson.loads(data)
    except ValueError as error:
        raise ProtocolError(f"not a request to replay: {shown(bytes(data[:40]))}") from error
    if not isinstance(raw, dict) or raw.keys() != {"format_version", *Request._fields}:
        raise ProtocolError(f"not a request to replay: {shown(raw)}")
    version = raw.pop("format_version")
    if version != REPLAY_FORMAT_VERSION:
        raise ProtocolError(f"request has format version {shown(version)}, this is {REPLAY_FORMAT_VERSION}")
    request = Request(**raw)
    if type(request.call) is not str or not _CALL.fullmatch(request.call):
        raise ProtocolError(f"request of call {shown(request.call)}")
    if type(request.attempt) is not int or not 0 <= request.attempt < 2**32:
        raise ProtocolError(f"request of attempt {shown(request.attempt)}")
    return request


def _decoded_fields(
    what: str, data: bytes | memoryview, dtypes: Mapping[str, tuple[str, ...]]
) -> tuple[Any, dict[str, Array]]:
    try:
        meta, arrays = decode_fields(REPLAY_FORMAT_VERSION, data)
    except ChunkError as error:
        raise ProtocolError(f"{what}: {error}") from error
    if arrays.keys() != dtypes.keys() or not isinstance(meta, dict):
        raise ProtocolError(f"{what} of {shown(list(arrays))}, not {', '.join(dtypes)}")
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.name not in dtypes[name]:
            raise ProtocolError(
                f"{what}: {name} is {array.dtype}{list(array.shape)}, not {dtypes[name][0]}[n]"
            )
    return meta, arrays


def _check_priorities(keys: Array, priorities: Array) -> None:
    if keys.ndim != 1 or keys.shape != priorities.shape or not 1 <= len(keys) <= MAX_PRIORITIES:
        raise ProtocolError(f"{list(priorities.shape)} priorities of {list(keys.shape)} keys")


def _check_sample(size: Any, arrays: dict[str, Array]) -> None:
    keys, probabilities, chunks = arrays["keys"], arrays["probabilities"], arrays["chunks"]
    if not keys.shape == probabilities.shape == chunks.shape or not 1 <= keys.size <= MAX_BATCH_SIZE:
        raise ProtocolError(
            f"sample of {keys.shape} keys, {probabilities.shape} probabilities and {chunks.shape} sequences"
        )
    if type(size) is not int or not 1 <= size < 2**63:
        raise ProtocolError(f"sample of a table of {shown(size)} items")
    if not (np.isfinite(probabilities) & (probabilities > 0) & (probabilities <= 1)).all():
        raise ProtocolError("sample with probabilities that are none")
    if (
        not chunks.all()
        or not arrays["bytes"].all()
        or int(chunks.sum(dtype=np.uint64)) != len(arrays["bytes"])
    ):
        raise ProtocolError(f"sample of {len(arrays['bytes'])} records that do not make up its sequences")


def _cut(view: memoryview, begin: int, sizes: list[int]) -> Iterator[memoryview]:
    end = begin + sum(map(_aligned, sizes))
    if end != len(view):
        raise ProtocolError(f"sample has {len(view)} bytes, its records end at {end}")
    for size in sizes:
        yield view[begin : begin + size]
        begin += _aligned(size)


def _padded(data: bytes | memoryview) -> tuple[bytes | memoryview, bytes]:
    return data, bytes(-len(data) % ALIGNMENT)


def _aligned(end: int) -> int:
    return end + -end % ALIGNMENT
