import secrets
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.wire.replay import (
    MAX_BATCH_SIZE,
    Assembly,
    Request,
    SampleAnswer,
    decode_answer,
    decode_priorities,
    decode_sample,
    decode_sample_request,
    decode_snapshot_request,
    encode_answer,
    encode_priorities,
    encode_request,
    encode_sample,
    is_part,
    parts_of,
)

CALL = "0123456789abcdef" * 2
probabilities = st.floats(0, 1, exclude_min=True)


@st.composite
def answers(draw: st.DrawFn) -> SampleAnswer:
    rows = draw(
        st.lists(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3), min_size=1, max_size=5)
    )
    count = len(rows)
    keys = draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count))
    chances = draw(st.lists(probabilities, min_size=count, max_size=count))
    return SampleAnswer(np.array(keys, "u8"), np.array(chances), draw(st.integers(1, 2**40)), rows)


def assert_same_answer(actual: SampleAnswer, expected: SampleAnswer) -> None:
    assert actual.keys.tobytes() == expected.keys.tobytes()
    assert actual.probabilities.tobytes() == expected.probabilities.tobytes()
    assert actual.size == expected.size
    assert [[bytes(row) for row in rows] for rows in actual.rows] == expected.rows


@given(answer=answers())
def test_a_sample_comes_back_as_it_was_with_its_records_aligned(answer: SampleAnswer) -> None:
    data = encode_sample(answer)
    decoded = decode_sample(data)
    assert_same_answer(decoded, answer)
    begin = np.frombuffer(data, "u1").ctypes.data
    for rows in decoded.rows:
        assert all((np.frombuffer(row, "u1").ctypes.data - begin) % 8 == 0 for row in rows)


@given(answer=answers(), max_bytes=st.integers(256, 400), data=st.data())
def test_parts_in_any_order_are_the_answer_and_fit_a_message(
    answer: SampleAnswer, max_bytes: int, data: st.DataObject
) -> None:
    request = Request(CALL, 3, len(answer.keys))
    whole = encode_sample(answer)
    parts = data.draw(st.permutations(parts_of(whole, request, max_bytes)))
    assert all(len(part) <= max_bytes and is_part(part) for part in parts)
    assembly = Assembly(request)
    *others, last = parts
    for part in others:
        assert assembly.add(part) is None
        assert assembly.add(part) is None  # a second time does no harm
    assert assembly.add(last) == whole


@pytest.mark.parametrize("old", [Request(CALL, 0, 4), Request(CALL[::-1], 1, 4), Request(CALL, 1, 4)])
def test_parts_of_two_answers_are_never_mixed(old: Request) -> None:
    new = Request(CALL, 1, 4)
    wholes = secrets.token_bytes(1000), secrets.token_bytes(1000)
    assembly = Assembly(new)
    first, *others = parts_of(wholes[1], new, 300)
    assert assembly.add(first) is None
    for part, other in zip(others, parts_of(wholes[0], old, 300), strict=False):
        assert assembly.add(other) is None
        result = assembly.add(part)
    assert result == wholes[1]


@given(
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
    dtype=st.sampled_from(["f4", "f8"]),
    data=st.data(),
)
def test_priorities_come_back_as_they_were(keys: list[int], dtype: str, data: st.DataObject) -> None:
    wanted = np.array(data.draw(st.lists(st.floats(width=32), min_size=len(keys), max_size=len(keys))), dtype)
    got_keys, got = decode_priorities(encode_priorities(np.array(keys, "u8"), wanted))
    assert got_keys.tolist() == keys
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 1), ()])
def test_priorities_that_do_not_fit_their_keys_are_not_sent(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="priorities of"):
        encode_priorities(np.zeros(3 if shape != (0,) else 0, "u8"), np.zeros(shape))


def test_requests_come_back_as_they_were() -> None:
    sample, snapshot = Request(CALL, 0, 64), Request(CALL, 7, "update-100")
    assert decode_sample_request(encode_request(sample)) == sample
    assert decode_snapshot_request(encode_request(snapshot)) == snapshot


@pytest.mark.parametrize("value", [0, -1, MAX_BATCH_SIZE + 1, 1.5, True, None, "64", [64]])
def test_a_batch_size_that_cannot_be_is_refused_in_words(value: Any) -> None:
    with pytest.raises(ProtocolError, match="a batch of"):
        decode_sample_request(encode_request(Request(CALL, 0, value)))


@pytest.mark.parametrize("value", ["", "../x", "a/b", "a.b", "x" * 65, 7, None])
def test_a_snapshot_that_could_lie_anywhere_else_is_refused_in_words(value: Any) -> None:
    with pytest.raises(ProtocolError, match="is not named by"):
        decode_snapshot_request(encode_request(Request(CALL, 0, value)))


@pytest.mark.parametrize(
    "change",
    [{"call": "x"}, {"call": 1}, {"attempt": -1}, {"attempt": 2**32}, {"format_version": 2}, {"more": 1}],
)
def test_a_request_that_is_none_is_refused(change: dict[str, Any]) -> None:
    raw = orjson.loads(encode_request(Request(CALL, 0, 64))) | change
    with pytest.raises(ProtocolError, match="request"):
        decode_sample_request(orjson.dumps(raw))


def test_answers_in_words_come_back_as_they_were() -> None:
    assert decode_answer(encode_answer("refused", "no")) == ("refused", "no")
    assert decode_answer(encode_answer("done", {"items": np.int64(3)})) == ("done", {"items": 3})


@given(st.binary(max_size=300))
def test_garbage_is_nothing_at_all(data: bytes) -> None:
    for decode in (
        decode_sample_request,
        decode_snapshot_request,
        decode_priorities,
        decode_sample,
        decode_answer,
    ):
        with pytest.raises(ProtocolError):
            decode(data)
    with pytest.raises(ProtocolError):
        Assembly(Request(CALL, 0, 1)).add(data)


REQUEST = Request(CALL, 0, 2)
SAMPLE = encode_sample(
    SampleAnswer(np.arange(2, dtype="u8"), np.array([0.5, 0.1]), 9, [[b"a", b"bc"], [b"def"]])
)


@given(data=st.data())
def test_changed_bytes_give_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    messages = [
        (encode_request(REQUEST), decode_sample_request),
        (encode_priorities(np.arange(3), np.ones(3)), decode_priorities),
        (SAMPLE, decode_sample),
        (parts_of(SAMPLE, REQUEST, 2**20)[0], Assembly(REQUEST).add),
        (encode_answer("done", {"items": 3}), decode_answer),
    ]
    whole, decode = data.draw(st.sampled_from(messages))
    mutated = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode(bytes(mutated[: data.draw(st.integers(0, 2 * len(whole)))]))


@pytest.mark.parametrize(
    "change",
    [
        {"probabilities": np.array([0.5, np.nan])},
        {"probabilities": np.array([0.5, 0.0])},
        {"probabilities": np.array([0.5, 1.5])},
        {"probabilities": np.array([0.5])},
        {"size": 0},
        {"rows": [[b"a"], []]},
        {"rows": [[b"a"], [b""]]},
        {"rows": [[b"a"]]},
    ],
)
def test_a_sample_that_cannot_be_is_not_sent(change: dict[str, Any]) -> None:
    answer = SampleAnswer(np.arange(2, dtype="u8"), np.array([0.5, 0.1]), 9, [[b"a"], [b"b"]])
    with pytest.raises(ProtocolError, match="sample"):
        encode_sample(answer._replace(**change))
