import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from services.actor.finite import NotFinite
from services.actor.results import WrongResult
from services.actor.spaces import (
    ActionDecoder,
    ObservationCheck,
    ObservationEncoder,
    check_fits,
    environment_spec,
)
from shared.errors import UnsupportedEnvironment
from shared.specs import LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.hello import environment_from_hello, to_proto_observation

TWO = spaces.Discrete(2)
NESTED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (4, 5, 3), np.uint8),
        "arm": spaces.Tuple([spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(4, start=-1)]),
        "deep": spaces.Dict({"z": spaces.Box(0, 1, (), np.bool_), "a": spaces.Box(-5, 9, (3,), np.int16)}),
    }
)


def test_leaves_are_named_by_their_path_in_gymnasiums_order() -> None:
    spec = environment_spec(NESTED, TWO)
    assert [leaf.name for leaf in spec.observation] == [*_names(NESTED)]
    assert {leaf.name for leaf in spec.observation} == {"camera", "arm/0", "arm/1", "deep/z", "deep/a"}


def _names(space: spaces.Dict) -> list[str]:
    names: list[str] = []
    for key, child in space.spaces.items():
        if isinstance(child, spaces.Dict):
            names += [f"{key}/{name}" for name in _names(child)]
        elif isinstance(child, spaces.Tuple):
            names += [f"{key}/{index}" for index in range(len(child.spaces))]
        else:
            names.append(key)
    return names


def test_a_plain_space_is_called_observation_and_keeps_one_bound_where_all_are_alike() -> None:
    spec = environment_spec(spaces.Box(0, 255, (1, 84, 84), np.uint8), spaces.Discrete(6))
    assert spec.num_actions == 6
    assert spec.observation == (
        LeafSpec(name="observation", dtype="uint8", shape=(1, 84, 84), low=(0.0,), high=(255.0,)),
    )


def test_bounds_that_differ_are_kept_per_element_and_may_be_infinite() -> None:
    high = np.array([[4.8, np.inf], [0.5, np.inf]], np.float32)
    (leaf,) = environment_spec(spaces.Box(-high, high, dtype=np.float32), TWO).observation
    assert leaf.high == (float(np.float32(4.8)), float("inf"), 0.5, float("inf"))
    assert leaf.low == tuple(-value for value in leaf.high)


def test_a_discrete_observation_counts_from_zero() -> None:
    space = spaces.Discrete(5, start=10)
    (leaf,) = environment_spec(space, TWO).observation
    assert leaf == LeafSpec(name="observation", dtype="int64", shape=(), low=(0.0,), high=(4.0,), n=5)
    (data,) = ObservationEncoder(space, group_size=3)(np.array([10, 14, 12]))
    assert np.frombuffer(data, "<i8").tolist() == [0, 4, 2]


def test_every_leaf_of_a_nested_observation_arrives_as_it_was() -> None:
    batched = batch_space(NESTED, 3)
    batched.seed(1)
    observation: Any = batched.sample()
    spec = environment_spec(NESTED, TWO)
    encoded = dict(zip([leaf.name for leaf in spec.observation], _decoded(observation, spec), strict=True))
    np.testing.assert_array_equal(encoded["camera"], observation["camera"])
    np.testing.assert_array_equal(encoded["arm/0"], observation["arm"][0])
    np.testing.assert_array_equal(encoded["arm/1"], observation["arm"][1] + 1)
    np.testing.assert_array_equal(encoded["deep/z"], observation["deep"]["z"])
    np.testing.assert_array_equal(encoded["deep/a"], observation["deep"]["a"])


def test_arrays_are_filled_with_what_the_bytes_would_hold() -> None:
    batched = batch_space(NESTED, 3)
    batched.seed(2)
    observation: Any = batched.sample()
    spec = environment_spec(NESTED, TWO)
    arrays = [np.zeros((3, *leaf.shape), np.dtype(leaf.dtype)) for leaf in spec.observation]
    assert ObservationEncoder(NESTED, group_size=3)(observation, into=arrays) == []
    for array, sent in zip(arrays, _decoded(observation, spec), strict=True):
        np.testing.assert_array_equal(array, sent)


def _decoded(observation: Any, spec: Any) -> list[Any]:
    data = ObservationEncoder(NESTED, group_size=3)(observation)
    return [
        np.frombuffer(raw, np.dtype(leaf.dtype)).reshape(3, *leaf.shape)
        for raw, leaf in zip(data, spec.observation, strict=True)
    ]


def test_foreign_byte_order_and_memory_order_do_not_reach_the_wire() -> None:
    space = spaces.Box(0, 9, (2, 3), np.dtype(">f4"))
    values = np.asfortranarray(np.arange(12, dtype=">f4").reshape(2, 2, 3))
    (data,) = ObservationEncoder(space, group_size=2)(values)
    assert environment_spec(space, TWO).observation[0].dtype == "float32"
    np.testing.assert_array_equal(np.frombuffer(data, "<f4"), np.arange(12))


def test_another_dtype_than_the_spaces_is_converted() -> None:
    (data,) = ObservationEncoder(spaces.Box(0, 9, (1,), np.float32), group_size=2)(np.array([[1.5], [2.5]]))
    assert np.frombuffer(data, "<f4").tolist() == [1.5, 2.5]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "values", "words"),
    [
        (np.uint8, [0.5], "is float64; its space says uint8"),
        (np.uint8, [-1], "is int64; its space says uint8"),
        (np.uint8, np.array([256], np.uint16), "is uint16 with values beyond uint8"),
        (np.int32, [2**31], "is int64 with values beyond int32"),
        (np.int64, [np.nan], "is float64; its space says int64"),
        (np.bool_, [2], "is int64; its space says bool"),
    ],
)
def test_a_number_that_its_space_does_not_hold_is_refused_by_name(
    dtype: Any, values: Any, words: str, is_shared: bool
) -> None:
    space = spaces.Box(0, 1, (1,), dtype)
    into = [np.zeros((1, 1), dtype)] if is_shared else None
    with pytest.raises(WrongResult, match=words):
        ObservationEncoder(space, group_size=1)(np.array([values]), into=into)
    with pytest.raises(WrongResult, match=words):
        ObservationCheck(space)(np.array(values))


def test_a_discrete_observation_that_is_no_integer_is_refused_by_name() -> None:
    with pytest.raises(WrongResult, match="is float64; its space says int64"):
        ObservationEncoder(spaces.Discrete(9, start=2), group_size=1)(np.array([5.7]))


@pytest.mark.parametrize("value", [1, 11, -1, 2**40])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_discrete_observation_outside_its_space_is_refused_by_name(value: int, is_shared: bool) -> None:
    space = spaces.Discrete(9, start=2)
    into = [np.zeros(3, np.int64)] if is_shared else None
    with pytest.raises(WrongResult, match=f"'observation' is {value}; its space says 2 … 10"):
        ObservationEncoder(space, group_size=3)(np.array([2, value, 10]), into=into)
    with pytest.raises(WrongResult, match=f"'observation' is {value}; its space says 2 … 10"):
        ObservationCheck(space)(np.int64(value))
    ObservationCheck(space)(2)
    ObservationCheck(space)(10)


def test_another_shape_than_the_spaces_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedEnvironment, match=r"'observation' of a group has shape \[2, 2\].*\[2, 1\]"
    ):
        ObservationEncoder(spaces.Box(0, 9, (1,), np.float32), group_size=2)(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.MultiBinary(3), "'observation': space MultiBinary"),
        (spaces.Dict({"": TWO}), "a key of the observation is empty; rename it"),
        (spaces.Dict({"a": spaces.Dict({"": TWO})}), "a key of the observation is empty; rename it"),
        (spaces.Dict({"a": spaces.MultiDiscrete([2, 3])}), "'a': space MultiDiscrete"),
        (spaces.Tuple([spaces.Dict({"t": spaces.Text(4)})]), "'0/t': space Text"),
        (spaces.Dict({"g": spaces.Graph(spaces.Box(0, 1, (1,)), None)}), "'g': space Graph"),
        (spaces.Tuple([]), "holds nothing"),
        (spaces.Box(0, 1, (0,)), r"shape \[0\] holds no values"),
        (spaces.Dict({"a/b": TWO, "a": spaces.Dict({"b": TWO})}), "two observation leaves .* 'a/b'"),
    ],
)
def test_an_unsupported_observation_space_is_refused_by_name(space: Any, words: str) -> None:
    with pytest.raises(UnsupportedEnvironment, match=words) as caught:
        environment_spec(space, TWO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)]
)
def test_an_unsupported_action_space_is_refused_by_name(space: Any) -> None:
    with pytest.raises(UnsupportedEnvironment, match=f"action space {type(space).__name__}.*only Discrete"):
        environment_spec(spaces.Box(0, 1, (1,)), space)


def test_actions_get_the_start_and_dtype_of_their_space() -> None:
    decoded = ActionDecoder(spaces.Discrete(3, start=-1, dtype=np.int32))(np.array([0, 1, 2]))
    assert decoded.dtype == np.int32
    assert decoded.tolist() == [-1, 0, 1]


def test_what_the_actor_says_of_its_spaces_is_what_inference_understands() -> None:
    spec = environment_spec(NESTED, spaces.Discrete(7))
    hello = pb.Hello(
        protocol_version=1,
        run_id="r",
        actor_id="a",
        stream_id="s",
        group_size=2,
        role=pb.ROLE_TRAIN,
        observation=to_proto_observation(spec),
        action=pb.DiscreteActionSpec(n=7),
    )
    assert environment_from_hello(hello) == spec


FLOATS = spaces.Dict(
    {"n": spaces.Box(0, 9, (2,), np.int32), "x": spaces.Box(-np.inf, np.inf, (2,), np.float32)}
)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_is_not_finite_is_not_sent(value: float, is_shared: bool) -> None:
    encode = ObservationEncoder(FLOATS, group_size=2)
    into = [np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)] if is_shared else None
    observation = {"n": np.zeros((2, 2), np.int32), "x": np.zeros((2, 2), np.float32)}
    encode(observation, into=into)
    observation["x"][1, 0] = value
    with pytest.raises(NotFinite, match=f"observation 'x' is not finite as float32: {value}"):
        encode(observation, into=into)


@pytest.mark.parametrize("values", [[0.0, np.nan], np.array([1e39, 0.0]), np.array([0, -np.inf], np.float32)])
def test_an_observation_is_checked_in_the_type_in_which_it_is_sent(values: Any) -> None:
    check = ObservationCheck(FLOATS)
    check({"n": [0, 0], "x": [3.4e38, -1.0]})
    with pytest.raises(NotFinite, match="observation 'x' is not finite as float32"):
        check({"n": [0, 0], "x": values})


@pytest.mark.parametrize("value", [1e200, -1e39, np.nan, np.inf])
@pytest.mark.parametrize("is_encoded", [False, True])
def test_doubles_have_to_be_finite_as_the_floats_that_networks_compute_in(
    value: float, is_encoded: bool
) -> None:
    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    take: Any = ObservationEncoder(space, group_size=2) if is_encoded else ObservationCheck(space)
    observation = np.full(
        (2, 3) if is_encoded else (3,), 3.4e38
    )  # fine, although their squares add up to more
    take(observation)
    observation[..., 1] = value
    kind = "float32" if np.isfinite(value) else "float64"
    with pytest.raises(NotFinite, match=re.escape(f"'observation' is not finite as {kind}: {value}")):
        take(observation)


def test_half_floats_may_be_as_large_as_their_type_holds() -> None:
    check = ObservationCheck(spaces.Box(-np.inf, np.inf, (3,), np.float16))
    check(np.full(3, 65504.0, np.float16))
    with pytest.raises(NotFinite, match="not finite as float16: inf"):
        check(np.array([0, 0, np.inf], np.float16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"deep": {"z": False}}, "the observation lacks the key 'a' of 'deep/a'"),
        ({"arm": (np.zeros(2),)}, "the observation lacks the key 1 of 'arm/1'"),
        ({"deep": None}, "the observation lacks the key 'a' of 'deep/a'"),
        ({"arm": ([1, [2]], 0)}, "observation 'arm/0' is no array: "),
        ({"arm": (np.zeros(3), 0)}, "observation 'arm/0' has shape [3]; its space says [2]"),
        ({"camera": np.zeros((4, 5, 3))}, "observation 'camera' is float64; its space says uint8"),
        ({"camera": np.zeros((5, 4, 3), np.uint8)}, "'camera' has shape [5, 4, 3]; its space says [4, 5, 3]"),
    ],
)
def test_what_does_not_fit_its_space_is_put_in_words(change: dict[str, Any], words: str) -> None:
    NESTED.seed(3)
    observation = {**NESTED.sample(), "arm": ([0, 0.5], 2)}  # a float64 fits float32, and a list does, too
    check_fits(NESTED, observation)
    with pytest.raises(WrongResult, match=re.escape(words)):
        check_fits(NESTED, {**observation, **change})


def test_one_environments_shapes_are_looked_at() -> None:
    observation = {"n": [[0], [0]], "x": [0.0, 0.0]}
    with pytest.raises(WrongResult, match=re.escape("'n' has shape [2, 1]; its space says [2]")):
        ObservationCheck(FLOATS)(observation)


def test_a_group_that_lacks_a_leaf_is_named() -> None:
    with pytest.raises(WrongResult, match="the observation lacks the key 'x'"):
        ObservationEncoder(FLOATS, group_size=2)({"n": np.zeros((2, 2), np.int32)})
