import struct
import zlib
from copy import deepcopy
from typing import Any

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ChunkError
from shared.types import Array, Chunk
from shared.wire.chunks import decode_chunk, encode_chunk
from shared.wire.fields import Field, encode_fields
from tests.support.chunks import arrays_of, assert_same_chunk, image_chunk


def decoded_or_refused(message: bytes) -> Chunk | None:
    try:
        return decode_chunk(message)
    except ChunkError as error:
        text = str(error)
    assert "\n" not in text
    assert len(text) < 1000
    return None


def assert_refused_or_of_the_same_shapes(message: bytes, original: Chunk) -> None:
    chunk = decoded_or_refused(message)
    if chunk is not None:
        shapes = {name: (array.shape, array.dtype) for name, array in arrays_of(original).items()}
        assert {name: (array.shape, array.dtype) for name, array in arrays_of(chunk).items()} == shapes
        assert chunk.header == original.header


@given(st.binary(max_size=300))
def test_garbage_is_refused(message: bytes) -> None:
    assert decoded_or_refused(message) is None


@settings(max_examples=400)
@given(
    noise=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_are_refused_or_change_values_only(noise: bool, changes: list[tuple[int, int]]) -> None:
    chunk = image_chunk(noise=noise)
    message = bytearray(encode_chunk(chunk))
    for place, value in changes:
        message[place % len(message)] = value
    assert_refused_or_of_the_same_shapes(bytes(message), chunk)


@pytest.mark.parametrize("noise", [True, False])
def test_a_truncated_or_prolonged_message_is_refused(noise: bool) -> None:
    message = encode_chunk(image_chunk(noise=noise))
    for length in range(0, len(message), 7):
        assert decoded_or_refused(message[:length]) is None
    assert decoded_or_refused(message + b"\0") is None


def reassembled(head: Any, data: bytes) -> bytes:
    """A message with a valid checksum around any head."""
    text = head if isinstance(head, bytes) else orjson.dumps(head)
    opening = struct.pack("<4sII", b"SRLC", len(text), zlib.crc32(text)) + text
    return opening + bytes(-len(opening) % 64) + data


def taken_apart(message: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack_from("<4xI", message)[0]
    start = 12 + size + -(12 + size) % 64
    return orjson.loads(message[12 : 12 + size]), message[start:]


strange_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        ["raw", "zstd_rows", "observation/x", "bool", "float64", "object", "run", [], {}, [0], [2**62] * 4]
    ),
    st.lists(st.integers(-1, 2**40), max_size=5),
).map(deepcopy)  # lists among them are changed later


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path] * bool(path) + [place for key, item in items for place in paths(item, (*path, key))]


@settings(max_examples=400)
@given(data=st.data(), noise=st.booleans())
def test_a_hostile_header_is_refused_or_describes_a_chunk(data: st.DataObject, noise: bool) -> None:
    head, arrays = taken_apart(encode_chunk(image_chunk(noise=noise)))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(paths(head)))
        place: Any = head
        for key in path:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(strange_values)
        else:
            del place[last]
        if not head:
            break
    chunk = decoded_or_refused(reassembled(head, arrays))
    if chunk is not None:  # consistent enough to be written again
        assert_same_chunk(decode_chunk(encode_chunk(chunk)), chunk)


@pytest.mark.parametrize(
    "head", [b"", b"[]", b"{}", b"nonsense", b"null", b"1", b'"x"', b"[" * 100_000, b"\xff"]
)
def test_a_header_that_is_no_object_is_refused(head: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(reassembled(head, b""))


def field_of(head: dict[str, Any], name: str) -> dict[str, Any]:
    return next(field for field in head["fields"] if field["name"] == name)


def test_another_format_version_is_refused_by_both_numbers() -> None:
    head, data = taken_apart(encode_chunk(image_chunk()))
    with pytest.raises(ChunkError, match="format version 2, this is 1"):
        decode_chunk(reassembled({**head, "format_version": 2}, data))


def test_arrays_beyond_the_limit_are_refused_before_memory_is_set_aside() -> None:
    head, data = taken_apart(encode_chunk(image_chunk()))
    field_of(head, "observation/pixels")["shape"] = [4, 7, 2**20, 2**20]
    with pytest.raises(ChunkError, match="at most 67108864"):
        decode_chunk(reassembled(head, data))


def test_shapes_whose_product_overflows_are_refused() -> None:
    head, data = taken_apart(encode_chunk(image_chunk()))
    field_of(head, "observation/pixels")["shape"] = [4, 7, 2**63, 2**63]
    with pytest.raises(ChunkError, match="at most 67108864"):
        decode_chunk(reassembled(head, data))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 0), np.uint8),
        np.zeros((), np.uint8),
        np.zeros((1,) * 11, np.uint8),
        np.zeros(2, object),
        np.zeros(2, np.complex64),
        np.zeros(2, "M8[s]"),
        np.zeros(2, "U3"),
        np.zeros(2, [("x", "f4")]),
        np.zeros(2**26 + 1, np.uint8),
    ],
)
def test_an_array_that_cannot_travel_is_not_written(array: Array) -> None:
    with pytest.raises(ChunkError, match=r"'name' has|67108865 bytes of arrays"):
        encode_fields(1, {}, [Field(name="name", array=array)])


def test_a_name_cannot_stand_twice() -> None:
    with pytest.raises(ChunkError, match="'name' is no text or stands there twice"):
        encode_fields(1, {}, [Field(name="name", array=np.zeros(2))] * 2)


@pytest.mark.parametrize(
    "shape",
    [[4, 7, 24, 0], [-4, 7, -24, 24], [4.0, 7, 24, 24], [4, 7, 24, 24, True], "4", [], [[4]], [1] * 11],
)
def test_a_shape_that_cannot_be_is_refused(shape: Any) -> None:
    head, data = taken_apart(encode_chunk(image_chunk()))
    field_of(head, "observation/pixels")["shape"] = shape
    with pytest.raises(ChunkError, match="'observation/pixels' has shape"):
        decode_chunk(reassembled(head, data))


def with_first_row(frame: bytes) -> bytes:
    """A message whose first compressed row is `frame`."""
    head, data = taken_apart(encode_chunk(image_chunk(rows=1, frame_stack=1)))
    field = field_of(head, "observation/pixels")
    assert field["codec"] == "zstd_rows"
    later = [other for other in head["fields"] if other["offset"] > field["offset"]]
    assert [other["name"] for other in later] == ["state/0"]
    state = data[later[0]["offset"] :]
    field |= {"bytes": len(frame), "sizes": [len(frame)]}
    later[0]["offset"] = (field["offset"] + len(frame) + 63) // 64 * 64
    data = data[: field["offset"]] + frame
    return reassembled(head, data.ljust(later[0]["offset"], b"\0") + state)


ROW_BYTES = 7 * 24 * 24


def test_the_frames_of_another_encoder_are_read() -> None:
    frame = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(b"\7" * ROW_BYTES)
    assert (decode_chunk(with_first_row(frame)).observation["pixels"] == 7).all()


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstandard.compress(bytes(2**30 // 4)), id="far more than the row"),
        pytest.param(zstandard.compress(bytes(ROW_BYTES + 1)), id="a byte more"),
        pytest.param(zstandard.compress(bytes(ROW_BYTES - 1)), id="a byte less"),
        pytest.param(zstandard.compress(bytes(ROW_BYTES))[:-1], id="cut off"),
        pytest.param(
            zstandard.ZstdCompressor(write_content_size=False).compress(bytes(ROW_BYTES)),
            id="no size declared",
        ),
        pytest.param(b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8, id="a declared size of 2^64 - 1"),
        pytest.param(
            b"\x28\xb5\x2f\xfd\x80\xf8" + struct.pack("<I", ROW_BYTES) + b"\1\0\0", id="a huge window"
        ),
        pytest.param(b"no frame at all", id="no frame"),
    ],
)
def test_a_frame_that_does_not_hold_the_row_is_refused(frame: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_chunk(with_first_row(frame))


def test_what_begins_with_other_letters_is_no_chunk_though_all_else_is_right() -> None:
    message = encode_chunk(image_chunk())
    with pytest.raises(ChunkError, match=r"not a chunk: begins with b'SRLR'"):
        decode_chunk(b"SRLR" + message[4:])


def test_a_bool_that_is_neither_0_nor_1_is_refused() -> None:
    head, data = taken_apart(encode_chunk(image_chunk()))
    assert head["fields"][0]["name"] == "is_first"
    with pytest.raises(ChunkError, match="neither 0 nor 1"):
        decode_chunk(reassembled(head, b"\2" + data[1:]))


def test_no_single_field_can_be_missing() -> None:
    message = encode_chunk(image_chunk())
    for number in range(len(taken_apart(message)[0]["fields"]) - 1):  # without its state it is a chunk
        head, data = taken_apart(message)
        kept: list[dict[str, Any]] = []
        pieces = b""
        for field in head["fields"][:number] + head["fields"][number + 1 :]:
            pieces += bytes(-len(pieces) % 64)
            kept.append({**field, "offset": len(pieces)})
            pieces += data[field["offset"] : field["offset"] + field["bytes"]]
        name = head["fields"][number]["name"]
        if name == "history/pixels":
            continue
        with pytest.raises(ChunkError):
            decode_chunk(reassembled({**head, "fields": kept}, pieces))
