"""What docs/environments.md says of spaces and wrappers is so."""

import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from services.actor.environments import GroupMaker
from services.actor.spaces import environment_spec
from shared.errors import UnsupportedEnvironment
from shared.presets import read_preset
from shared.specs import LeafSpec
from tests.support.commands import ROOT

DOCUMENT = (ROOT / "docs/environments.md").read_text()
BOX, TWO = spaces.Box(0, 1, (1,)), spaces.Discrete(2, start=1)
EXAMPLES: dict[str, Any] = {
    "Box": BOX,
    "Discrete": TWO,
    "Dict": spaces.Dict({"a": spaces.Tuple([BOX, TWO])}),
    "Tuple": spaces.Tuple([spaces.Dict({"a": BOX}), TWO]),
    "MultiBinary": spaces.MultiBinary(2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "Text": spaces.Text(3),
    "Graph": spaces.Graph(BOX, None),
    "Sequence": spaces.Sequence(TWO),
    "OneOf": spaces.OneOf([BOX, TWO]),
}


def named(kind: str) -> tuple[list[str], list[str]]:
    """The spaces that the table supports and refuses for observations or actions."""
    (row,) = re.findall(rf"^\| {kind} \| (.*) \| (.*) \|$", DOCUMENT, re.MULTILINE)
    supported, refused = (re.findall(r"`(\w+)`", cell) for cell in row)
    return supported, refused


def test_the_spaces_that_are_supported_are_taken_and_the_others_refused_by_name() -> None:
    supported, refused = named("observations")
    assert {*supported, *refused} == {*EXAMPLES}
    for name in supported:
        environment_spec(EXAMPLES[name], TWO)
    for name in refused:
        with pytest.raises(UnsupportedEnvironment, match=f"space {name}"):
            environment_spec(EXAMPLES[name], TWO)
    supported, refused = named("actions")
    for name in supported:
        environment_spec(BOX, EXAMPLES[name])
    for name in refused:
        with pytest.raises(UnsupportedEnvironment, match=f"action space {name}"):
            environment_spec(BOX, EXAMPLES[name])


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "float16", "float64"])
def test_a_box_may_be_of_these_types(kind: str) -> None:
    (leaf,) = environment_spec(spaces.Box(0, 1, (2,), np.dtype(kind).type), TWO).observation
    assert leaf.dtype == kind


def atari(**changed: Any) -> GroupMaker:
    return GroupMaker(env="ALE/Breakout-v5", group_size=2, **changed)


def test_an_atari_id_is_the_vector_environment_that_is_described() -> None:
    env = atari(env_kwargs={"max_num_frames_per_episode": 80, "noop_max": 0})()
    assert env.single_observation_space == spaces.Box(0, 255, (1, 84, 84), np.uint8)
    assert env.single_action_space == spaces.Discrete(4)  # the minimal set
    frames = [env.reset()[1]["episode_frame_number"][0]]
    for _ in range(20):
        _, _, terminated, truncated, info = env.step(np.zeros(2, np.int64))
        frames.append(info["episode_frame_number"][0])
    env.close()
    assert frames == [*range(0, 84, 4)]
    assert truncated.all()
    assert not terminated.any()


@pytest.mark.parametrize("probability", [None, 0.25])
def test_atari_actions_are_sticky_only_where_that_is_asked_for(probability: float | None) -> None:
    asked = {} if probability is None else {"repeat_action_probability": probability}
    env, rng, is_same = atari(env_kwargs={"noop_max": 0, **asked})(), np.random.default_rng(0), []
    env.reset(seed=np.array([1, 2]))
    for _ in range(60):
        observation = env.step(np.full(2, rng.integers(4)))[0]
        is_same.append((observation[0] == observation[1]).all())
    env.close()
    assert all(is_same) == (probability is None)


def test_single_atari_environments_are_the_other_task_that_is_described() -> None:
    env = atari(vectorization="sync")()
    assert env.single_observation_space == spaces.Box(0, 255, (210, 160, 3), np.uint8)
    env.close()


def test_the_atari_presets_of_an_agent_are_alike_in_what_is_said_of_them() -> None:
    presets = [read_preset(path.stem).values for path in (ROOT / "presets").glob("atari_*.yaml")]
    said = {(each["agent"], each["life_loss"], each["reward_clip"], each["frame_stack"]) for each in presets}
    assert said == {("vtrace", True, 1.0, 4), ("r2d2", False, 0.0, 4)}


def test_a_registered_function_wraps_an_environment_and_takes_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _example(tmp_path, monkeypatch, "my_cartpole", minigrid=False)
    env = GroupMaker(env="my_cartpole:EmptyImage-v0", group_size=2, env_kwargs={"max_episode_steps": 3})()
    env.reset(seed=1)
    ends = [env.step(env.action_space.sample())[3].any() for _ in range(3)]
    env.close()
    assert ends == [False, False, True]
    spec = environment_spec(env.single_observation_space, spaces.Discrete(2))
    assert spec.observation[0].shape == (5,)  # CartPole's four, and the time


def test_the_example_leaves_only_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minigrid")
    _example(tmp_path, monkeypatch, "my_minigrid", minigrid=True)
    env = GroupMaker(env="my_minigrid:EmptyImage-v0", group_size=2)()
    env.reset(seed=1)
    env.close()
    assert env.single_observation_space == spaces.Box(0, 255, (7, 7, 3), np.uint8)
    image = LeafSpec(name="observation", dtype="uint8", shape=(7, 7, 3), low=(0.0,), high=(255.0,))
    assert environment_spec(env.single_observation_space, TWO).observation == (image,)


def _example(directory: Path, monkeypatch: pytest.MonkeyPatch, module: str, *, minigrid: bool) -> None:
    """Puts the document's module into the working directory; without minigrid around what Gymnasium has."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    if not minigrid:
        code = code.replace("MiniGrid-Empty-5x5-v0", "CartPole-v1").replace("minigrid.", "gymnasium.")
        code = code.replace("ImgObsWrapper", "TimeAwareObservation")
    (directory / f"{module}.py").write_text(code)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(gymnasium.registry, "EmptyImage-v0", raising=False)
