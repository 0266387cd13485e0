import dataclasses
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ChunkError
from shared.specs import Agent, RunSpec
from shared.wire.chunks import (
    NATS_HEADERS_BYTES,
    decode_chunk,
    encode_chunk,
    read_header,
    rows_per_message,
    slice_rows,
    worst_case_bytes,
)
from shared.wire.limits import DTYPES
from tests.support.chunks import arrays_of, assert_same_chunk, image_chunk, make_chunk, make_run_spec

Case = tuple[RunSpec, list[tuple[tuple[int, ...], str]], int]  # spec, state leaves, rows

AGENTS: tuple[Agent, ...] = get_args(Agent)

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
        agent=draw(st.sampled_from(AGENTS)),
    )
    state = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=3))
    return spec, state, draw(st.integers(1, 5))


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


def test_a_header_is_read_without_the_arrays() -> None:
    chunk = image_chunk()
    data = encode_chunk(chunk)
    assert read_header(data) == chunk.header
    assert read_header(memoryview(data)[: len(data) // 2]) == chunk.header
    with pytest.raises(ChunkError, match="not a chunk"):
        read_header(b"no chunk at all")


def test_threads_encode_and_decode_at_once() -> None:
    spec = make_run_spec([("pixels", "uint8", (84, 84))], unroll=20)
    chunks = [make_chunk(spec, rows=16 + number, noise=False) for number in range(4)]
    for number, chunk in enumerate(chunks):  # frames that keep the compressor busy
        chunk.observation["pixels"][..., ::3] = np.random.default_rng(number).integers(0, 4, (84, 28))
    with ThreadPoolExecutor(4) as threads:
        copies = threads.map(lambda chunk: decode_chunk(encode_chunk(chunk)), chunks * 16)
        for chunk, copy in zip(chunks * 16, copies, strict=True):
            assert_same_chunk(copy, chunk)


# What is no chunk


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
    ("change", "words"),
    [
        ({"td_errors": None}, "lacks behaviour_logits or td_errors"),
        ({"behaviour_logits": np.zeros((2, 5, 3), np.float32)}, "has both behaviour_logits and td_errors"),
        ({"td_errors": np.zeros((2, 5, 3), np.float32)}, r"not \[R, T\]"),
        ({"td_errors": np.zeros((2, 6), np.float32)}, "is bool"),
        ({"td_errors": np.zeros((2, 5), np.float64)}, "'td_errors' is float64"),
    ],
)
def test_a_chunk_of_r2d2_has_td_errors_and_nothing_else(change: dict[str, Any], words: str) -> None:
    chunk = make_chunk(make_run_spec(agent="r2d2"))
    assert b"behaviour_logits" not in encode_chunk(chunk)
    with pytest.raises(ChunkError, match=words):
        encode_chunk(dataclasses.replace(chunk, **change))


def test_a_chunk_without_logits_and_td_errors_is_refused() -> None:
    message = encode_chunk(make_chunk(make_run_spec(agent="r2d2")))
    opening = 12 + int.from_bytes(message[4:8], "little")
    head = message[12:opening].replace(b"td_errors", b"td_horror")
    damaged = message[:8] + zlib.crc32(head).to_bytes(4, "little") + head + message[opening:]
    with pytest.raises(ChunkError, match="lacks behaviour_logits or td_errors"):
        decode_chunk(damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1},
        {"number": 2**63},
        {"number": 1.0},
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
