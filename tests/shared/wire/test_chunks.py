import dataclasses
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ChunkError
from shared.specs import RunSpec
from shared.types import Chunk
from shared.wire.chunks import (
    NATS_HEADERS_BYTES,
    decode_chunk,
    encode_chunk,
    rows_per_message,
    slice_rows,
    worst_case_bytes,
)
from shared.wire.limits import DTYPES
from tests.support.chunks import arrays_of, assert_same_chunk, make_chunk, make_run_spec

Case = tuple[RunSpec, list[tuple[tuple[int, ...], str]], int]  # spec, state leaves, rows

shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    leaves = draw(
        st.lists(
            st.tuples(names, st.sampled_from(DTYPES), shapes),
            min_size=1,
            max_size=3,
            unique_by=lambda leaf: leaf[0],
        )
    )
    spec = make_run_spec(
        leaves,
        unroll=draw(st.integers(1, 12)),
        actions=draw(st.integers(1, 4)),
        frame_stack=draw(st.integers(1, 4)),
    )
    state = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=3))
    return spec, state, draw(st.integers(1, 5))


def image_chunk(*, rows: int = 4, noise: bool = False, frame_stack: int = 3) -> Chunk:
    spec = make_run_spec([("pixels", "uint8", (24, 24))], unroll=6, frame_stack=frame_stack)
    return make_chunk(spec, [((8,), "float32")], rows=rows, noise=noise)


@given(case=cases(), seed=st.integers(0, 2**32), compress=st.booleans(), noise=st.booleans())
def test_a_chunk_comes_back_as_it_was(case: Case, seed: int, compress: bool, noise: bool) -> None:
    spec, state, rows = case
    chunk = make_chunk(spec, state, rows=rows, seed=seed, noise=noise)
    assert_same_chunk(decode_chunk(encode_chunk(chunk, compress=compress)), chunk)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_chunk_is_read_from_any_buffer(wrap: Any) -> None:
    chunk = image_chunk()
    assert_same_chunk(decode_chunk(wrap(encode_chunk(chunk))), chunk)


@pytest.mark.parametrize("leaf", ["pixels", "history"])
def test_frames_that_repeat_take_few_bytes(leaf: str) -> None:
    chunk = image_chunk(rows=32, frame_stack=6)
    plain, small = (len(encode_chunk(chunk, compress=compress)) for compress in (False, True))
    frames = chunk.observation["pixels"] if leaf == "pixels" else chunk.history["pixels"]
    assert plain - small > 0.9 * frames.nbytes


def test_frames_that_do_not_compress_are_stored_as_they_are() -> None:
    chunk = image_chunk(rows=32, noise=True)
    assert encode_chunk(chunk, compress=True) == encode_chunk(chunk, compress=False)


def test_frames_that_start_compressible_but_are_not_are_stored_as_they_are() -> None:
    chunk = image_chunk(rows=32, noise=True)
    chunk.observation["pixels"][0] = 0
    assert encode_chunk(chunk, compress=True) == encode_chunk(chunk, compress=False)


def test_small_observations_are_not_compressed() -> None:
    chunk = make_chunk(make_run_spec([("observation", "float32", (4,))], unroll=20), rows=64, noise=False)
    assert encode_chunk(chunk, compress=True) == encode_chunk(chunk, compress=False)


def test_what_is_not_compressed_is_a_view_of_the_message() -> None:
    message = encode_chunk(image_chunk(noise=True))
    backing = np.frombuffer(message, np.uint8)
    for name, array in arrays_of(decode_chunk(message)).items():
        assert np.shares_memory(array, backing), name
        assert (array.ctypes.data - backing.ctypes.data) % 64 == 0, name


def test_an_array_that_is_not_contiguous_travels() -> None:
    chunk = image_chunk(noise=True)
    time_major = np.ascontiguousarray(chunk.reward.T)
    assert_same_chunk(decode_chunk(encode_chunk(dataclasses.replace(chunk, reward=time_major.T))), chunk)


def test_a_big_endian_array_travels() -> None:
    chunk = image_chunk(noise=True)
    swapped = dataclasses.replace(chunk, action=chunk.action.astype(">i8"))
    assert_same_chunk(decode_chunk(encode_chunk(swapped)), chunk)


def test_threads_encode_and_decode_at_once() -> None:
    chunks = [image_chunk(rows=8 + number, noise=number % 2 == 0) for number in range(8)] * 8
    with ThreadPoolExecutor(4) as threads:
        for chunk, copy in zip(
            chunks, threads.map(lambda c: decode_chunk(encode_chunk(c)), chunks), strict=True
        ):
            assert_same_chunk(copy, chunk)


# Damaged and hostile messages


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
)


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


@pytest.mark.parametrize(
    "change",
    [
        {"reward": np.zeros((4, 7), np.float32)},
        {"reward": np.zeros((4, 6), np.float64)},
        {"observation": {}},
        {"observation": {"pixels": np.zeros((4, 6, 24, 24), np.uint8)}},
        {"observation": {"pixels": np.zeros((4, 7, 0), np.uint8)}},
        {"observation": {"pixels": np.zeros((4, 7), object)}},
        {"history": {"other": np.zeros((4, 2, 24, 24), np.uint8)}},
        {"history": {"pixels": np.zeros((4, 2, 24, 23), np.uint8)}},
        {"history": {"pixels": np.zeros((4, 2, 24, 24), np.int8)}},
        {"state": (np.zeros((3, 2), np.float32),)},
        {"behaviour_logits": np.zeros((4, 6), np.float32)},
    ],
)
def test_fields_that_do_not_fit_each_other_are_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(ChunkError):
        encode_chunk(dataclasses.replace(image_chunk(), **change))


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1},
        {"number": 2**63},
        {"first_row": 1},
        {"actor_id": "x" * 513},
        {"task": "\ud800"},
        {"run_id": 1},
        {"task": "\1" * 128},
    ],
)
def test_a_header_that_cannot_be_is_not_written(change: dict[str, Any]) -> None:
    chunk = image_chunk()
    with pytest.raises(ChunkError):
        encode_chunk(dataclasses.replace(chunk, header=dataclasses.replace(chunk.header, **change)))


# Rows and messages


def test_slices_hold_the_rows_they_name_and_know_where_they_stood() -> None:
    chunk = image_chunk(noise=True)
    part = slice_rows(slice_rows(chunk, 1, 4), 1, 3)
    assert part.rows == 2
    assert part.header.first_row == 2
    assert part.header.group_size == chunk.header.group_size
    for name, array in arrays_of(part).items():
        whole = arrays_of(chunk)[name]
        np.testing.assert_array_equal(array, whole if name.startswith("weights_") else whole[2:4])
        assert np.shares_memory(array, whole)


@given(case=cases(), data=st.data())
def test_slices_put_together_are_the_chunk(case: Case, data: st.DataObject) -> None:
    spec, state, rows = case
    chunk = make_chunk(spec, state, rows=rows)
    size = data.draw(st.integers(1, rows))
    parts = [
        decode_chunk(encode_chunk(slice_rows(chunk, first, min(first + size, rows))))
        for first in range(0, rows, size)
    ]
    assert [part.header.first_row for part in parts] == list(range(0, rows, size))
    joined = {
        name: np.concatenate([arrays_of(part)[name] for part in parts])
        for name in arrays_of(chunk)
        if not name.startswith("weights_")
    }
    for name, array in joined.items():
        assert array.tobytes() == arrays_of(chunk)[name].tobytes(), name


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (-1, 2), (2, 1), (0, 5)])
def test_rows_that_are_not_there_cannot_be_sliced(start: int, stop: int) -> None:
    with pytest.raises(ChunkError, match=f"rows {start} to {stop} of a chunk of 4"):
        slice_rows(image_chunk(), start, stop)


LONGEST_IDS = {
    "run_id": "r" * 64,
    "stream_id": "s" * 64,
    "actor_id": "\U0001f916" * 128,
    "task": "\U0001f916" * 128,
}


@given(case=cases(), seed=st.integers(0, 2**32), noise=st.booleans(), compress=st.booleans())
def test_no_message_is_longer_than_the_worst_case(case: Case, seed: int, noise: bool, compress: bool) -> None:
    spec, state, rows = case
    header = {**LONGEST_IDS, "number": 2**63 - 1, "group_size": 2**63 - 1, "first_row": 2**63 - 1 - rows}
    chunk = make_chunk(spec, state, rows=rows, seed=seed, noise=noise, header=header)
    length = len(encode_chunk(chunk, compress=compress))
    bound = worst_case_bytes(spec, state, rows)
    assert length <= bound
    if noise:
        assert bound - length < 200  # and it is no looser than it must be


@pytest.mark.parametrize("compressible", np.linspace(0.05, 0.2, 16))
def test_barely_compressible_frames_stay_within_the_worst_case(compressible: float) -> None:
    spec = make_run_spec([("a", "uint8", (7, 7)), ("b", "uint8", (8, 8))], unroll=41, frame_stack=64)
    chunk = make_chunk(spec, rows=64, header=LONGEST_IDS)
    for leaf in (*chunk.observation.values(), *chunk.history.values()):
        rows = leaf.reshape(len(leaf), -1)
        rows[:, : int(rows.shape[1] * compressible)] = 0
    assert len(encode_chunk(chunk)) <= worst_case_bytes(spec, (), 64)


@given(case=cases(), group_size=st.integers(1, 300), max_payload=st.integers(3_000, 200_000))
def test_as_many_rows_travel_together_as_fit(case: Case, group_size: int, max_payload: int) -> None:
    spec, state, _ = case
    room = max_payload - NATS_HEADERS_BYTES
    try:
        rows = rows_per_message(spec, state, group_size, max_payload)
    except ChunkError:
        assert worst_case_bytes(spec, state, 1) > room
        return
    assert 1 <= rows <= group_size
    assert worst_case_bytes(spec, state, rows) <= room
    assert rows == group_size or worst_case_bytes(spec, state, rows + 1) > room


def test_a_row_too_large_for_a_message_is_refused_with_its_size() -> None:
    spec = make_run_spec([("pixels", "uint8", (256, 256, 3))], unroll=100)
    with pytest.raises(ChunkError, match=r"take up to 198\d{5} bytes, a message has room for 1048064"):
        rows_per_message(spec, (), 4, 2**20)


def test_rows_of_more_than_64_mib_never_travel_together() -> None:
    spec = make_run_spec([("pixels", "uint8", (1024, 1024))], unroll=15)
    assert rows_per_message(spec, (), 64, 2**40) == 3
