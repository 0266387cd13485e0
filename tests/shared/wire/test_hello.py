import math
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION, environment_from_hello, to_proto_observation
from shared.wire.limits import DTYPES

BOX = {"name": "pixels", "dtype": "uint8", "shape": [2, 3], "low": [0.0], "high": [255.0]}
DISCRETE = {"name": "goal", "dtype": "int64", "shape": [], "low": [0.0], "high": [4.0], "n": 5}


def make_hello(*leaves: dict[str, Any], **changes: Any) -> pb.Hello:
    values: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "run_id": "run",
        "actor_id": "host-1",
        "stream_id": "stream-1",
        "group_size": 16,
        "role": pb.ROLE_TRAIN,
        "task": "CartPole-v1",
        "observation": [pb.LeafSpec(**leaf) for leaf in leaves or (BOX,)],
        "action": pb.DiscreteActionSpec(n=2),
    }
    return pb.Hello(**(values | changes))


def refusal(hello: pb.Hello) -> str:
    with pytest.raises(ProtocolError) as caught:
        environment_from_hello(hello)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_hello_gives_the_environment_in_wire_order() -> None:
    assert environment_from_hello(make_hello(DISCRETE, BOX)) == EnvironmentSpec(
        observation=(
            LeafSpec(name="goal", dtype="int64", shape=(), low=(0.0,), high=(4.0,), n=5),
            LeafSpec(name="pixels", dtype="uint8", shape=(2, 3), low=(0.0,), high=(255.0,)),
        ),
        num_actions=2,
    )


@pytest.mark.parametrize("role", [pb.ROLE_TRAIN, pb.ROLE_EVAL])
@pytest.mark.parametrize("task", ["", "ALE/Pong-v5", "my project:Maze-v0", "Ümlaut"])
def test_every_role_and_printable_task_is_accepted(role: pb.Role, task: str) -> None:
    environment_from_hello(make_hello(role=role, task=task))


bounds = st.floats(allow_nan=False)


@st.composite
def leaves(draw: st.DrawFn, name: str) -> LeafSpec:
    if draw(st.booleans()):
        n = draw(st.integers(1, 2**20))
        return LeafSpec(name=name, dtype="int64", shape=(), low=(0.0,), high=(float(n - 1),), n=n)
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    pairs = [
        sorted(draw(st.tuples(bounds, bounds))) for _ in range(draw(st.sampled_from([1, math.prod(shape)])))
    ]
    low, high = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    shared = [side[:1] if len(set(side)) == 1 else side for side in (low, high)]
    return LeafSpec(
        name=name, dtype=draw(st.sampled_from(DTYPES)), shape=shape, low=shared[0], high=shared[1]
    )


@given(data=st.data(), names=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
def test_a_spec_survives_the_journey(data: st.DataObject, names: list[str]) -> None:
    spec = EnvironmentSpec(
        observation=tuple(data.draw(leaves(name)) for name in names),
        num_actions=data.draw(st.integers(1, 100)),
    )
    hello = make_hello(action=pb.DiscreteActionSpec(n=spec.num_actions))
    del hello.observation[:]
    hello.observation.extend(to_proto_observation(spec))
    assert environment_from_hello(pb.Hello.FromString(hello.SerializeToString())) == spec


def test_bounds_given_per_element_but_all_the_same_become_one_number() -> None:
    spelled_out = make_hello({**BOX, "low": [0.0] * 6, "high": [255.0] * 6})
    assert environment_from_hello(spelled_out) == environment_from_hello(make_hello())


def test_bounds_may_be_infinite_and_differ_between_elements() -> None:
    hello = make_hello({**BOX, "dtype": "float32", "low": [-math.inf], "high": [1, 2, 3, 4, 5, math.inf]})
    assert environment_from_hello(hello).observation[0].high == (1.0, 2.0, 3.0, 4.0, 5.0, math.inf)


def test_two_protocol_versions_are_both_named() -> None:
    text = refusal(make_hello(protocol_version=7))
    assert text == "hello.protocol_version: the actor speaks version 7, this service version 1"


def test_the_version_is_complained_about_before_anything_else() -> None:
    assert refusal(pb.Hello()).startswith("hello.protocol_version: ")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("run_id", "", "'' is not 1 to 64 letters"),
        ("run_id", "a.b", "'a.b' is not 1 to 64 letters"),
        ("run_id", "x" * 65, "is not 1 to 64 letters"),
        ("run_id", "run\n", r"'run\n' is not 1 to 64 letters"),
        ("stream_id", "", "'' is not 1 to 64 letters"),
        ("stream_id", "a b", "'a b' is not 1 to 64 letters"),
        ("actor_id", "", "'' is not 1 to 128 printable characters"),
        ("actor_id", "a\nb", r"'a\nb' is not 1 to 128 printable characters"),
        ("actor_id", "x" * 129, "is not 1 to 128 printable characters"),
        ("task", "x" * 129, "is not 0 to 128 printable characters"),
        ("task", "\x1b[31m", r"'\x1b[31m' is not 0 to 128 printable characters"),
        ("group_size", 0, "0 environments; a group has 1 to 65536"),
        ("group_size", 65537, "65537 environments; a group has 1 to 65536"),
        ("role", 0, "0 is neither ROLE_TRAIN (1) nor ROLE_EVAL (2)"),
        ("role", 9, "9 is neither ROLE_TRAIN (1) nor ROLE_EVAL (2)"),
        ("action", None, "missing"),
        ("observation", [], "0 leaves; there are 1 to 256"),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any, complaint: str) -> None:
    text = refusal(make_hello(**{field: value}))
    assert text.startswith(f"hello.{field}: ")
    assert complaint in text


@pytest.mark.parametrize("n", [0, 2**20 + 1, 2**64 - 1])
def test_a_number_of_actions_that_cannot_be_is_named(n: int) -> None:
    assert refusal(make_hello(action=pb.DiscreteActionSpec(n=n))).startswith(f"hello.action.n: {n} actions")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": ""}, "hello.observation[0].name: '' is not 1 to 128 printable characters"),
        ({"name": "x" * 129}, "hello.observation[0].name: 'xxx"),
        ({"dtype": "complex64"}, "hello.observation['pixels'].dtype: 'complex64' is none of bool, uint8"),
        ({"dtype": "float"}, "hello.observation['pixels'].dtype: 'float' is none of"),
        ({"dtype": ">f4"}, "hello.observation['pixels'].dtype: '>f4' is none of"),
        ({"dtype": "x" * 1_000_000}, "hello.observation['pixels'].dtype: 'xxx"),
        ({"shape": [2, 0]}, "hello.observation['pixels'].shape: [2, 0] has a dimension of size 0"),
        ({"shape": [1] * 9}, "hello.observation['pixels'].shape: 9 dimensions; there are at most 8"),
        ({"shape": [2**32 - 1] * 8}, "hello.observation['pixels'].shape: "),
        ({"low": []}, "hello.observation['pixels'].low: 0 numbers; 1 or one per element (6) was expected"),
        ({"high": [1.0] * 5}, "hello.observation['pixels'].high: 5 numbers; 1 or one per element (6)"),
        ({"low": [math.nan]}, "hello.observation['pixels'].low: holds a NaN"),
        ({"low": [256.0]}, "hello.observation['pixels'].low: a lower bound is above the upper one"),
        ({"low": [0, 0, 0, 0, 0, 300]}, "hello.observation['pixels'].low: a lower bound is above the upper"),
    ],
)
def test_a_bad_leaf_is_named(change: dict[str, Any], complaint: str) -> None:
    text = refusal(make_hello({**BOX, **change}))
    assert complaint in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "change", [{"dtype": "int32"}, {"shape": [1]}, {"low": [1.0]}, {"high": [5.0]}, {"n": 2**20 + 1}]
)
def test_a_discrete_leaf_counts_from_zero_in_int64(change: dict[str, Any]) -> None:
    assert refusal(make_hello({**DISCRETE, **change})).startswith("hello.observation['goal'].n: ")


def test_a_name_used_twice_is_named() -> None:
    assert refusal(make_hello(BOX, BOX)) == "hello.observation[1].name: 'pixels' stands there twice"


def test_more_leaves_than_a_step_may_have_are_refused() -> None:
    many = [{**BOX, "name": str(number)} for number in range(257)]
    assert refusal(make_hello(*many)).startswith("hello.observation: 257 leaves")


def test_a_group_whose_step_would_be_too_large_for_a_message_is_refused() -> None:
    text = refusal(make_hello({**BOX, "shape": [1024, 1024]}, group_size=64))
    assert text.startswith("hello.group_size: a Step of 64 environments has 67109312 bytes")


@given(st.binary(max_size=200))
def test_any_message_that_protobuf_accepts_is_accepted_or_refused_in_words(data: bytes) -> None:
    try:
        hello = pb.Hello.FromString(data)
    except DecodeError:  # the message never gets so far
        return
    refusal(hello)
