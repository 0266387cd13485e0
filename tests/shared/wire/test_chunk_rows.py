import dataclasses
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ChunkError
from shared.types import Chunk
from shared.wire.chunk_rows import chunk_of_record, split_message
from shared.wire.chunks import decode_chunk, encode_chunk, slice_rows
from shared.wire.limits import DTYPES
from tests.support.chunks import arrays_of, assert_same_chunk, image_chunk, make_chunk, make_run_spec

shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    leaves = draw(
        st.lists(
            st.tuples(names, st.sampled_from(DTYPES), shapes),
            min_size=1,
            max_size=3,
            unique_by=lambda leaf: leaf[0],
        )
    )
    spec = make_run_spec(
        leaves, unroll=draw(st.integers(1, 12)), frame_stack=draw(st.integers(1, 4)), agent="r2d2"
    )
    state = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=3))
    rows, first = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    chunk = make_chunk(
        spec,
        state,
        rows=rows,
        seed=draw(st.integers(0, 2**32)),
        noise=draw(st.booleans()),
        header={"first_row": first, "group_size": first + rows},
    )
    return dataclasses.replace(
        chunk,
        weights_update=np.array(
            draw(st.lists(st.integers(-1, 2), min_size=spec.unroll, max_size=spec.unroll))
        ),
    )


def frames_chunk(*, rows: int = 4, noise: bool = False) -> Chunk:
    """Frames and recurrent states of Atari's shapes."""
    spec = make_run_spec([("observation", "uint8", (84, 84))], unroll=20, frame_stack=4, agent="r2d2")
    chunk = make_chunk(spec, [((512,), "float32")] * 2, rows=rows, noise=noise)
    versions = np.repeat(np.array([3, 5]), 10)
    return dataclasses.replace(chunk, weights_version=versions, weights_update=100 * versions)


@given(chunk=chunks(), compress=st.booleans())
def test_a_record_is_its_row_bit_for_bit(chunk: Chunk, compress: bool) -> None:
    message = encode_chunk(chunk, compress=compress)
    rows = split_message(message)
    assert rows.header == chunk.header
    assert len(rows.records) == chunk.rows
    for row, record in enumerate(rows.records):
        assert_same_chunk(chunk_of_record(record), slice_rows(decode_chunk(message), row, row + 1))


@pytest.mark.parametrize("noise", [False, True])
def test_frames_travel_as_they_arrived(noise: bool) -> None:
    chunk = frames_chunk(noise=noise)
    message = encode_chunk(chunk)
    for row, record in enumerate(split_message(message).records):
        assert_same_chunk(chunk_of_record(record), slice_rows(chunk, row, row + 1))
        assert record[-(20_000 if noise else 20) :] in message


def test_what_replay_needs_is_there_without_the_records() -> None:
    chunk = frames_chunk()
    rows = split_message(encode_chunk(chunk))
    assert chunk.td_errors is not None
    np.testing.assert_array_equal(rows.td_errors, chunk.td_errors)
    np.testing.assert_array_equal(rows.reset_steps, chunk.is_first[:, 1:])


def test_a_record_costs_few_bytes_beside_its_rows_own() -> None:
    chunk = frames_chunk(noise=True)
    own = sum(array.nbytes for name, array in arrays_of(slice_rows(chunk, 0, 1)).items())
    for record in split_message(encode_chunk(chunk)).records:
        assert len(record) - own < 300


def test_the_arrays_of_a_record_are_aligned_views_that_nobody_can_write() -> None:
    (record, *_) = split_message(encode_chunk(frames_chunk(noise=True))).records
    backing = np.frombuffer(bytearray(record), np.uint8)
    for name, array in arrays_of(chunk_of_record(memoryview(backing))).items():
        if not name.startswith("weights_"):
            assert np.shares_memory(array, backing), name
            assert array.ctypes.data % array.dtype.itemsize == 0, name
            assert not array.flags.writeable, name


# What is no chunk, and no record


def test_a_chunk_without_td_errors_is_refused() -> None:
    with pytest.raises(ChunkError, match="no td_errors"):
        split_message(encode_chunk(image_chunk()))


def test_a_field_that_nobody_compresses_is_refused_where_it_is_compressed() -> None:
    chunk = make_chunk(make_run_spec([("a", "uint8", (64, 64))], agent="r2d2"), noise=False)
    head, data = _head(encode_chunk(chunk))
    with pytest.raises(ChunkError, match=r"'ybservation/a' is compressed|unknown fields"):
        split_message(_message(head.replace(b"observation/a", b"ybservation/a"), data))


def _head(message: bytes) -> tuple[bytes, bytes]:
    end = 12 + int.from_bytes(message[4:8], "little")
    return message[12:end], message[end + -end % 64 :]


def _message(head: bytes, data: bytes) -> bytes:
    opening = b"SRLC" + len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head
    return opening + bytes(-len(opening) % 64) + data


@given(st.binary(max_size=300))
def test_garbage_is_no_message_and_no_record(data: bytes) -> None:
    for read in (split_message, chunk_of_record):
        with pytest.raises(ChunkError):
            read(data)


MESSAGE = encode_chunk(
    make_chunk(make_run_spec([("a", "uint8", (40, 40))], agent="r2d2"), [((3,), "float32")], noise=False)
)
RECORD = split_message(MESSAGE).records[1]


@given(data=st.data())
def test_changed_bytes_give_a_chunk_or_a_chunk_error(data: st.DataObject) -> None:
    for whole, read in ((MESSAGE, split_message), (RECORD, chunk_of_record)):
        mutated = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            mutated[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        mutated = mutated[: data.draw(st.integers(0, 2 * len(whole)))]
        with suppress(ChunkError):
            read(bytes(mutated))


@given(data=st.data())
def test_a_changed_head_with_the_right_checksum_gives_a_chunk_or_a_chunk_error(data: st.DataObject) -> None:
    for whole, read, at in ((MESSAGE, split_message, 12), (RECORD, chunk_of_record, 16)):
        end = at + int.from_bytes(whole[at - 8 : at - 4], "little")
        head = bytearray(whole[at:end])
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.integers(0, len(head) - 1))
            head[place] = data.draw(st.sampled_from(b'0123456789-.e[]{},:"tfnul'))
        checksum = zlib.crc32(head).to_bytes(4, "little")
        with suppress(ChunkError):
            read(whole[: at - 4] + checksum + bytes(head) + whole[end:])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"[[5,", b"[[4,", "weights of other than 5 steps"),
        (b"],5,0,", b"],6,0,", "weights of other than 6 steps"),
        (b"],5,0,", b"],9999999999999,0,", "at most"),
        (b'"uint8"', b'"object"', "dtype"),
    ],
)
def test_a_head_that_does_not_fit_its_record_is_refused_in_words(old: bytes, new: bytes, words: str) -> None:
    end = 16 + int.from_bytes(RECORD[8:12], "little")
    head = RECORD[16:end].replace(old, new, 1)
    assert head != RECORD[16:end]
    start = end + -end % 8
    opening = RECORD[:8] + len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head
    with pytest.raises(ChunkError, match=words):
        chunk_of_record(opening + bytes(-len(opening) % 8) + RECORD[start:])


def test_a_record_cut_short_or_with_bytes_behind_it_is_refused() -> None:
    for damaged in (RECORD[:-1], RECORD + b"x", RECORD[:100], RECORD[:10]):
        with pytest.raises(ChunkError):
            chunk_of_record(damaged)
