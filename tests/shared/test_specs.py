import math
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

PIXELS = LeafSpec(name="pixels", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))
GOAL = LeafSpec(name="goal", dtype="int64", shape=(), low=(0.0,), high=(4.0,), n=5)
SPEC = RunSpec(
    environment=EnvironmentSpec(observation=(PIXELS, GOAL), num_actions=6),
    network=NetworkSpec(name="impala_shallow", lstm_size=256, frame_stack=4),
    agent="vtrace",
    unroll=20,
    reward_clip=1.0,
)

numbers = st.floats(allow_nan=False)
leaf_specs = st.builds(
    LeafSpec,
    name=st.text(min_size=1, max_size=8),
    dtype=st.sampled_from(["uint8", "float32", "int64", "bool"]),
    shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    low=st.lists(numbers, min_size=1, max_size=3).map(tuple),
    high=st.lists(numbers, min_size=1, max_size=3).map(tuple),
    n=st.integers(0, 9),
)
run_specs = st.builds(
    RunSpec,
    environment=st.builds(
        EnvironmentSpec,
        observation=st.lists(leaf_specs, max_size=3).map(tuple),
        num_actions=st.integers(1, 20),
    ),
    network=st.builds(
        NetworkSpec,
        name=st.sampled_from(["mlp", "my.nets:Net"]),
        lstm_size=st.integers(0, 512),
        frame_stack=st.integers(1, 64),
        hidden_sizes=st.lists(st.integers(1, 512), max_size=3).map(tuple),
        dueling_size=st.integers(0, 512),
    ),
    agent=st.sampled_from(["vtrace", "r2d2"]),
    unroll=st.integers(1, 200),
    reward_clip=st.floats(0, 10),
    discount=st.floats(0, 1),
    n_steps=st.integers(0, 10),
)


@given(run_specs)
def test_a_run_spec_survives_json(spec: RunSpec) -> None:
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.network_hash == spec.network_hash


def test_infinite_bounds_survive_json() -> None:
    leaf = replace(PIXELS, dtype="float32", low=(-math.inf,), high=(math.inf,))
    spec = replace(SPEC, environment=EnvironmentSpec(observation=(leaf,), num_actions=2))
    assert RunSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "data",
    [b"", b"nonsense", b"[]", b"{}", b"null", b"\xff", b'{"format_version": 1}'],
)
def test_what_is_no_spec_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match="not a run spec"):
        RunSpec.from_json(data)


@pytest.mark.parametrize("path", ["environment", "network", "agent", "unroll", "reward_clip"])
def test_a_spec_without_one_of_its_fields_is_refused(path: str) -> None:
    raw = orjson.loads(SPEC.to_json())
    del raw[path]
    with pytest.raises(ConfigurationError, match="not a run spec"):
        RunSpec.from_json(orjson.dumps(raw))


@pytest.mark.parametrize("change", [{"dtype": "nonsense"}, {"low": ["x"]}, {"shape": 1}, {"high": None}])
def test_a_spec_with_a_bad_leaf_is_refused(change: dict[str, Any]) -> None:
    raw = orjson.loads(SPEC.to_json())
    raw["environment"]["observation"][0] |= change
    with pytest.raises(ConfigurationError, match="not a run spec"):
        RunSpec.from_json(orjson.dumps(raw))


def test_another_format_version_is_refused_by_both_numbers() -> None:
    raw = {**orjson.loads(SPEC.to_json()), "format_version": 2}
    with pytest.raises(ConfigurationError, match="format version 2, this is 1"):
        RunSpec.from_json(orjson.dumps(raw))


def test_the_network_hash_is_the_same_in_every_process() -> None:
    assert SPEC.network_hash == "c438b01ae688ab66"


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, environment=replace(SPEC.environment, num_actions=7)),
        replace(SPEC, environment=replace(SPEC.environment, observation=(GOAL, PIXELS))),
        replace(SPEC, network=replace(SPEC.network, lstm_size=128)),
        replace(SPEC, network=replace(SPEC.network, frame_stack=1)),
        replace(SPEC, reward_clip=0.0),
        replace(SPEC, agent="r2d2"),
        replace(SPEC, network=replace(SPEC.network, dueling_size=512)),
    ],
)
def test_what_changes_weights_or_inputs_changes_the_network_hash(other: RunSpec) -> None:
    assert other.network_hash != SPEC.network_hash


@pytest.mark.parametrize("change", [{"unroll": 40}, {"discount": 0.9}, {"n_steps": 3}])
def test_how_chunks_are_cut_does_not_change_the_network_hash(change: dict[str, Any]) -> None:
    assert replace(SPEC, **change).network_hash == SPEC.network_hash


def test_a_spec_from_before_there_was_r2d2_is_still_read() -> None:
    raw = orjson.loads(SPEC.to_json())
    del raw["discount"], raw["n_steps"], raw["network"]["dueling_size"]
    assert RunSpec.from_json(orjson.dumps(raw)) == SPEC


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agent": "r2d2"}, "agent is r2d2, the run's is vtrace"),
        ({"discount": 0.9}, "discount is 0.9, the run's is 0.0"),
        ({"n_steps": 3}, "n_steps is 3, the run's is 0"),
    ],
)
def test_services_of_one_run_agree_on_how_td_errors_are_computed(change: dict[str, Any], words: str) -> None:
    assert SPEC.disagreement(replace(SPEC, **change)) == words


def test_a_row_of_a_leaf_takes_its_elements_bytes() -> None:
    assert PIXELS.row_bytes == 7056
    assert GOAL.row_bytes == 8


def test_equal_environments_do_not_differ() -> None:
    assert SPEC.environment.difference(SPEC.environment) is None
    assert SPEC.disagreement(SPEC) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            EnvironmentSpec(observation=(PIXELS, GOAL), num_actions=18),
            "the run has 6 actions, this environment 18",
        ),
        (
            EnvironmentSpec(observation=(replace(PIXELS, shape=(64, 64)), GOAL), num_actions=6),
            "observation is pixels: uint8[64, 64] [0, 255]; the run's is pixels: uint8[84, 84] [0, 255]",
        ),
        (
            EnvironmentSpec(observation=(PIXELS,), num_actions=6),
            "observation is without 'goal'; the run's is goal: int64[] n=5",
        ),
        (
            EnvironmentSpec(observation=(GOAL, PIXELS), num_actions=6),
            "the observation leaves stand in another order than the run's",
        ),
    ],
)
def test_a_difference_is_said_in_words(other: EnvironmentSpec, words: str) -> None:
    assert SPEC.environment.difference(other) == words


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(SPEC, unroll=40), "unroll is 40, the run's is 20"),
        (replace(SPEC, reward_clip=0.0), "reward_clip is 0.0, the run's is 1.0"),
        (
            replace(SPEC, network=replace(SPEC.network, name="mlp")),
            "network name is mlp, the run's is impala_shallow",
        ),
        (
            replace(SPEC, environment=replace(SPEC.environment, num_actions=2)),
            "the run has 6 actions, this environment 2",
        ),
    ],
)
def test_a_disagreement_names_the_setting(other: RunSpec, words: str) -> None:
    assert SPEC.disagreement(other) == words


def test_bounds_that_differ_between_elements_are_shown_as_their_span() -> None:
    leaf = LeafSpec(name="x", dtype="float32", shape=(2,), low=(-1.5, -math.inf), high=(1.0,))
    assert str(leaf) == "x: float32[2] [-inf…-1.5, 1]"
