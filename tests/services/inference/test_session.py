from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.refusal import REASONS, Refusal
from services.inference.session import FRAMING_BYTES, StepReader, read_hello
from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from tests.support.counting_group import ENVIRONMENT, CountingGroup

ROWS = 3
MIXED = EnvironmentSpec(
    observation=(
        LeafSpec(name="picture", dtype="uint8", shape=(2, 2), low=(0.0,), high=(255.0,)),
        LeafSpec(name="place", dtype="int64", shape=(), low=(0.0,), high=(4.0,), n=5),
        LeafSpec(name="door", dtype="bool", shape=(1,), low=(0.0,), high=(1.0,)),
    ),
    num_actions=4,
)


def mixed_step(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "sequence": 0,
        "observation": [
            np.arange(4 * ROWS, dtype=np.uint8).tobytes(),
            np.array([0, 4, 2], "<i8").tobytes(),
            bytes([0, 1, 1]),
        ],
        "reward": np.array([1.5, -2.0, 0.0], "<f4").tobytes(),
        "terminated": bytes(3),
        "truncated": bytes(3),
        "is_first": bytes([1, 1, 1]),
    }
    return pb.ActRequest(step=pb.Step(**{**fields, **changes})).SerializeToString()


def reader() -> StepReader:
    return StepReader(MIXED, group_size=ROWS)


def shared() -> list[Any]:
    return [
        np.arange(4 * ROWS, dtype=np.uint8).reshape(ROWS, 2, 2),
        np.array([0, 4, 2], "<i8"),
        np.array([[False], [True], [True]]),
    ]


def test_observations_in_shared_memory_are_what_they_are_in_messages() -> None:
    reads = StepReader(MIXED, group_size=ROWS, shared=shared())
    step, sent = reads.read(mixed_step(observation=[])), reader().read(mixed_step())
    assert list(step.observation) == list(sent.observation)
    for name, leaf in step.observation.items():
        np.testing.assert_array_equal(leaf, sent.observation[name])


def test_observations_in_shared_memory_are_checked_and_come_in_no_message() -> None:
    wrong = shared()
    wrong[1][2] = 5
    reads = StepReader(MIXED, group_size=ROWS, shared=wrong).read
    refusal = refused(reads, mixed_step(observation=[]))
    assert str(refusal) == "observation 'place' holds a value outside 0 … 4"
    refusal = refused(reads, mixed_step())
    assert str(refusal) == "observation has 3 leaves, expected 0; it lies in shared memory"


def refused(read: Any, data: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(data)
    assert caught.value.status == "INVALID_ARGUMENT"
    assert caught.value.reason in REASONS
    return caught.value


def test_a_hello_becomes_an_introduction() -> None:
    actor = CountingGroup(4, stream_id="s-1", actor_id="host-7", role="eval")
    introduction = read_hello(actor.hello(run_id="pong"), run_id="pong")
    assert introduction.environment == ENVIRONMENT
    assert (introduction.run_id, introduction.actor_id, introduction.stream_id) == ("pong", "host-7", "s-1")
    assert (introduction.group_size, introduction.role, introduction.task) == (4, "eval", "Counting-v0")


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"protocol_version": 2}, "protocol_version", "hello.protocol_version"),
        ({"run_id": "other"}, "run_id", "'other'; this service belongs to run 'pong'"),
        ({"group_size": 0}, "hello", "hello.group_size"),
        ({"stream_id": "a b"}, "hello", "hello.stream_id"),
        ({"actor_id": ""}, "hello", "hello.actor_id"),
        ({"role": 0}, "hello", "hello.role"),
        ({"observation": []}, "hello", "hello.observation"),
        ({"group_size": 6_000_000}, "hello", "hello.group_size"),
    ],
)
def test_a_bad_hello_is_refused_with_its_field(changes: dict[str, Any], reason: str, words: str) -> None:
    hello = CountingGroup(2).hello(**{"run_id": "pong", **changes})
    refusal = refused(lambda data: read_hello(data, run_id="pong"), hello)
    assert refusal.reason == reason
    assert words in str(refusal)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"garbage" * 100, b"\x0a\x05ab"])
def test_bytes_that_are_no_request_are_called_so(data: bytes) -> None:
    assert refused(lambda each: read_hello(each, run_id="pong"), data).reason == "garbage"
    assert refused(reader().read, data).reason == "garbage"


def test_a_message_out_of_turn_is_refused() -> None:
    assert refused(lambda data: read_hello(data, run_id="pong"), mixed_step()).reason == "order"
    assert refused(lambda data: read_hello(data, run_id="pong"), b"").reason == "order"
    assert refused(reader().read, CountingGroup(ROWS).hello(run_id="pong")).reason == "order"
    assert refused(reader().read, b"").reason == "order"


def test_a_step_is_shown_as_arrays() -> None:
    step = reader().read(mixed_step())
    np.testing.assert_array_equal(step.observation["picture"], np.arange(12).reshape(3, 2, 2))
    np.testing.assert_array_equal(step.observation["place"], [0, 4, 2])
    np.testing.assert_array_equal(step.observation["door"], [[False], [True], [True]])
    np.testing.assert_array_equal(step.reward, np.float32([1.5, -2.0, 0.0]))
    assert step.is_first.dtype == step.terminated.dtype == step.truncated.dtype == np.bool_
    assert step.is_first.all()
    assert not (step.terminated | step.truncated).any()


def test_sequences_count_from_zero() -> None:
    session = reader()
    session.read(mixed_step())
    session.read(mixed_step(sequence=1, is_first=bytes(3), terminated=bytes([1, 0, 0])))
    assert session.sequence == 2
    refusal = refused(session.read, mixed_step(sequence=1, is_first=bytes(3)))
    assert refusal.reason == "sequence"
    assert "sequence is 1, expected 2" in str(refusal)


PICTURE, PLACE, DOOR = bytes(12), bytes(24), bytes(3)


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"sequence": 1}, "sequence", "sequence is 1, expected 0"),
        ({"observation": [PICTURE, PLACE]}, "leaves", "2 leaves, expected 3"),
        ({"observation": [PICTURE[1:], PLACE, DOOR]}, "bytes", "'picture' has 11 bytes, expected 3 × 4 = 12"),
        ({"observation": [PICTURE, PLACE + b"x", DOOR]}, "bytes", "'place' has 25 bytes"),
        ({"observation": [PICTURE, b"\5" + PLACE[1:], DOOR]}, "observation", "a value outside 0 … 4"),
        ({"observation": [PICTURE, PLACE[:16] + b"\xff" * 8, DOOR]}, "observation", "'place'"),
        ({"observation": [PICTURE, PLACE, bytes([0, 2, 0])]}, "observation", "'door'"),
        ({"reward": bytes(8)}, "bytes", "reward has 8 bytes, expected 3 × 4 = 12"),
        ({"reward": np.array([0, np.nan, 0], "<f4").tobytes()}, "reward", "reward of row 1 is nan"),
        ({"reward": np.array([0, 0, -np.inf], "<f4").tobytes()}, "reward", "reward of row 2 is -inf"),
        ({"terminated": bytes(2)}, "bytes", "terminated has 2 bytes"),
        ({"truncated": bytes([0, 2, 0])}, "flags", "truncated holds 2, expected 0 or 1"),
        ({"is_first": bytes([1, 1, 255])}, "flags", "is_first holds 255"),
        ({"is_first": bytes([1, 0, 1])}, "is_first", "must be 1 in every row at sequence 0"),
        ({"terminated": bytes([0, 0, 1])}, "is_first", "is_first and terminated or truncated"),
        ({"truncated": bytes([1, 0, 0])}, "is_first", "is_first and terminated or truncated"),
    ],
)  # fmt: skip
def test_a_bad_step_is_refused_with_field_expected_and_got(
    changes: dict[str, Any], reason: str, words: str
) -> None:
    refusal = refused(reader().read, mixed_step(**changes))
    assert refusal.reason == reason
    assert words in str(refusal)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_observations_are_finite(value: float) -> None:
    actor = CountingGroup(ROWS)
    actor.advance()
    actor.observations[0][1, 2] = value
    refusal = refused(StepReader(ENVIRONMENT, group_size=ROWS).read, actor.step())
    assert refusal.reason == "observation"
    assert "'observation' holds a value that is not finite" in str(refusal)


def test_float_observations_are_finite_in_the_type_that_networks_compute_in() -> None:
    leaf = LeafSpec(name="observation", dtype="float64", shape=(2,), low=(-np.inf,), high=(np.inf,))
    environment = EnvironmentSpec(observation=(leaf,), num_actions=2)

    def step(value: float) -> bytes:
        observation = np.full((ROWS, 2), value, "<f8").tobytes()
        flags = {name: bytes(ROWS) for name in ("terminated", "truncated")}
        return pb.ActRequest(
            step=pb.Step(
                sequence=0, observation=[observation], reward=bytes(4 * ROWS), is_first=b"\1" * ROWS, **flags
            )
        ).SerializeToString()

    assert StepReader(environment, group_size=ROWS).read(step(3e38)).observation["observation"].max() == 3e38
    refusal = refused(StepReader(environment, group_size=ROWS).read, step(1e300))
    assert "'observation' holds a value that is not finite as float32" in str(refusal)


def test_a_step_longer_than_it_can_be_is_not_even_parsed() -> None:
    refusal = refused(reader().read, b"\xff" * (FRAMING_BYTES + ROWS * 20 + 1))
    assert refusal.reason == "size"


def test_a_bad_step_does_not_count() -> None:
    session = reader()
    refused(session.read, mixed_step(reward=b""))
    session.read(mixed_step())
    assert session.sequence == 1


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words_or_read(data: bytes) -> None:
    for read in (lambda each: read_hello(each, run_id="pong"), reader().read):
        with suppress(Refusal):
            read(data)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_step_is_refused_in_words_or_read(data: st.DataObject) -> None:
    message = bytearray(mixed_step())
    for _ in range(data.draw(st.integers(1, 5))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Refusal):
        reader().read(bytes(message))
