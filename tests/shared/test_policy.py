import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from shared.checkpoints import latest_checkpoint, read_checkpoint, save_checkpoint
from shared.errors import ConfigurationError, RunError
from shared.networks.build import build_network
from shared.networks.interface import NetworkInput, Output
from shared.policy import leaf_value, load_policy
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.counting_environment import CountingEnvironment


def leaf(name: str = "observation", *shape: int, dtype: str = "float32", n: int = 0) -> LeafSpec:
    return LeafSpec(name=name, dtype=dtype, shape=shape, low=(0.0,), high=(255.0,), n=n)


def save_run(
    run_dir: Path,
    *leaves: LeafSpec,
    reward_clip: float = 0.0,
    num_actions: int = 16,
    agent: Agent = "vtrace",
    **network: Any,
) -> RunSpec:
    spec = RunSpec(
        environment=EnvironmentSpec(observation=leaves, num_actions=num_actions),
        network=NetworkSpec(**network),
        agent=agent,
        unroll=20,
        reward_clip=reward_clip,
    )
    torch.manual_seed(5)
    weights = build_network(spec).state_dict()
    for value in weights.values():
        value += torch.randn_like(value) * 0.3  # so that the policy is far from uniform
    save_checkpoint(
        run_dir / "checkpoints",
        spec=spec,
        weights=weights,
        optimizer_state={},
        counters={"updates": 1},
        rng={},
        keep=1,
    )
    torch.manual_seed(6)
    return spec


def by_hand(
    spec: RunSpec, run_dir: Path, frames: list[np.ndarray], actions: list[int], rewards: list[float]
) -> Any:
    """Logits or Q-values of an episode's newest step, with every input written out from its first step on."""
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    network = build_network(spec)
    network.load_state_dict(checkpoint.weights)
    stack = spec.network.frame_stack
    padded = [np.zeros_like(frames[0])] * (stack - 1) + frames
    stacked = np.stack([np.stack(padded[t : t + stack]) for t in range(len(frames))])
    clip = spec.reward_clip or np.inf
    inputs = NetworkInput(
        observation={"observation": torch.from_numpy(stacked if stack > 1 else stacked[:, 0])[:, None]},
        previous_action=torch.tensor([[0], *([a] for a in actions)]),
        previous_reward=torch.tensor([[0.0], *([float(np.clip(r, -clip, clip))] for r in rewards)]),
        is_first=torch.tensor([[True], *([False] for _ in actions)]),
    )
    with torch.no_grad():
        output, _ = network(inputs, network.initial_state(1))
    return output[0][-1, 0]


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
@pytest.mark.parametrize("by_argument", [False, True])
@pytest.mark.parametrize(("lstm_size", "frame_stack"), [(8, 3), (8, 1), (0, 3), (0, 1)])
def test_over_episodes_the_policy_equals_the_network_run_by_hand(
    tmp_path: Path, lstm_size: int, frame_stack: int, by_argument: bool, agent: Agent
) -> None:
    network = {"name": "mlp", "lstm_size": lstm_size, "frame_stack": frame_stack}
    spec = save_run(tmp_path, leaf("observation", 3), reward_clip=2.0, agent=agent, **network)
    policy = load_policy(tmp_path)
    assert policy.spec == spec
    outputs: list[Output] = []
    policy._network.register_forward_hook(lambda *called: outputs.append(called[-1][0]))
    environment = CountingEnvironment(lengths=(6, 2, 4))
    reward = 7.0
    for episode in range(3):
        observation, _ = environment.reset(seed=3 if episode == 0 else None)
        frames: list[np.ndarray] = []
        actions: list[int] = []
        rewards: list[float] = []
        done = False  # while the last episode's reward is still given, and must be ignored
        while not done:
            frames.append(observation)
            first = {"is_first": not actions} if by_argument else {}
            action = policy(observation, reward=reward, greedy=True if agent == "r2d2" else None, **first)
            expected = by_hand(spec, tmp_path, frames, actions, rewards)
            torch.testing.assert_close(outputs[-1][0][0, 0], expected)
            assert action == int(expected.argmax())
            observation, reward, terminated, truncated, _ = environment.step(np.int64(action))
            reward /= 1000  # about 4, so clipped
            actions.append(action)
            rewards.append(reward)
            done = terminated or truncated
        if not by_argument:
            policy.reset()


def test_every_number_the_counting_network_tells_is_right(tmp_path: Path) -> None:
    save_run(tmp_path, leaf("observation", 3), name="tests.support.counting:CountingNetwork", frame_stack=4)
    policy = load_policy(tmp_path)
    environment = CountingEnvironment(lengths=(4, 2))
    for _ in range(3):
        policy.reset()
        observation, _ = environment.reset(seed=10)
        done, reward = False, 0.0
        while not done:
            instance, _, step = observation.tolist()
            action = policy(observation, reward=reward)
            assert action == (instance + step - 1) % 16
            observation, reward, done, _, _ = environment.step(np.int64(action))


def test_sampled_actions_follow_the_policys_probabilities_and_the_seed(tmp_path: Path) -> None:
    spec = save_run(tmp_path, leaf("observation", 2), num_actions=3, name="mlp")
    observation = np.array([0.1, 0.2], np.float32)
    expected = by_hand(spec, tmp_path, [observation], [], []).softmax(-1)
    drawn = []
    for _ in range(2):
        policy = load_policy(tmp_path, seed=4)
        drawn.append([policy(observation, is_first=True, greedy=False) for _ in range(2000)])
    assert drawn[0] == drawn[1]
    frequencies = torch.bincount(torch.tensor(drawn[0]), minlength=3) / 2000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.04)
    assert len(set(drawn[0])) == 3
    assert {load_policy(tmp_path)(observation) for _ in range(3)} == {int(expected.argmax())}


def test_r2d2_takes_its_best_action_and_one_time_in_a_thousand_any(tmp_path: Path) -> None:
    spec = save_run(tmp_path, leaf("observation", 2), num_actions=4, name="mlp", agent="r2d2")
    observation = np.array([0.1, 0.2], np.float32)
    best = int(by_hand(spec, tmp_path, [observation], [], []).argmax())
    policy, calls = load_policy(tmp_path, seed=4), 4_000
    others = sum(policy(observation, is_first=True) != best for _ in range(calls))
    assert others == pytest.approx(calls * 0.001 * 3 / 4, abs=8)
    assert others
    assert {policy(observation, is_first=True, greedy=True) for _ in range(calls // 3)} == {best}


def test_nested_observations_of_gymnasium_are_taken_as_they_are(tmp_path: Path) -> None:
    leaves = (
        leaf("camera", 4, 5, dtype="uint8"),
        leaf("pose/0", 2),
        leaf("pose/1/joint", dtype="int64", n=3),
    )
    save_run(tmp_path, *leaves, num_actions=4, name="mlp", frame_stack=2, lstm_size=4)
    space = gymnasium.spaces.Dict(
        camera=gymnasium.spaces.Box(0, 255, (4, 5), np.uint8),
        pose=gymnasium.spaces.Tuple(
            [gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Dict(joint=gymnasium.spaces.Discrete(3))]
        ),
    )
    space.seed(0)
    policy = load_policy(tmp_path)
    assert all(0 <= policy(space.sample()) < 4 for _ in range(3))


@pytest.mark.parametrize(
    ("observation", "name", "expected"),
    [
        (3, "observation", 3),
        ({"observation": 3, "goal": 4}, "observation", 3),
        ({"a": {"b": 5}, "a/b": 6}, "a/b", 6),
        ({"a": (1, {"c/d": 7})}, "a/1/c/d", 7),
        ((1, 2), "1", 2),
    ],
)
def test_a_leaf_is_found_by_its_name(observation: Any, name: str, expected: int) -> None:
    assert leaf_value(observation, leaf(name, dtype="int64")) == expected


@pytest.mark.parametrize(
    ("observation", "spec", "words"),
    [
        (np.zeros(4, np.float32), leaf("observation", 3), r"must be \[3\], not \[4\]"),
        (
            np.zeros((1, 3), np.float32),
            leaf("observation", 3),
            r"must be \[3\], not \[1, 3\]; a policy is for one environment: take one for each",
        ),
        (
            np.array([1, 2, 0]),
            leaf(dtype="int64", n=3),
            r"must be \[\], not \[3\]; a policy is for one environment",
        ),
        (np.zeros((2, 4), np.float32), leaf("observation", 3), r"must be \[3\], not \[2, 4\]$"),
        ([[0.0], [0.0, 1.0]], leaf("observation", 2), "must be float32: setting an array element"),
        ([0, 256], leaf("observation", 2, dtype="uint8"), "has values beyond uint8"),
        ([0, -1], leaf("observation", 2, dtype="uint8"), "has values beyond uint8"),
        (np.array(2**64 - 1, np.uint64), leaf(dtype="int64"), "has values beyond int64"),
        (np.zeros(3, np.float32), leaf("observation", 3, dtype="uint8"), "must be uint8, not float32$"),
        ("left", leaf("observation"), "must be float32"),
        (3, leaf(dtype="int64", n=3), "must be 0 to 2, not 3"),
        ([0.0, np.nan], leaf("observation", 2), "'observation' must be finite as float32, not nan"),
        ({"x": np.float32(-np.inf)}, leaf("x"), "'x' must be finite as float32, not -inf"),
        ([0.0, 1e300], leaf("observation", 2), r"must be finite as float32, not 1e\+300"),
        ([0.0, 1e300], leaf("observation", 2, dtype="float64"), r"must be finite as float32, not 1e\+300"),
        ([0.0, 1e5], leaf("observation", 2, dtype="float16"), r"must be finite as float16, not 100000"),
        (np.array([256, 3], np.uint16), leaf("observation", 2, dtype="uint8"), "has values beyond uint8"),
        (2**31 + 3, leaf(dtype="int32"), "has values beyond int32"),
        ({"x": 1}, leaf("y"), "has no 'y'"),
        ({"x": 1}, leaf("x/y"), "has no 'x/y'"),
        ((1, 2), leaf("2"), "has no '2'"),
    ],
)
def test_an_observation_of_another_environment_is_refused_in_words(
    observation: Any, spec: LeafSpec, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        leaf_value(observation, spec)


def test_lists_of_integers_are_taken_for_any_type_that_holds_them() -> None:
    pixels = leaf_value([[0, 255], [3, 4]], leaf("observation", 2, 2, dtype="uint8"))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[0, 255], [3, 4]]
    assert leaf_value(np.array([5], np.uint64), leaf("observation", 1, dtype="int32")).tolist() == [5]


@pytest.mark.parametrize("reward", [2, np.array([2.0]), np.float32(2), np.array([[2]]), torch.tensor(2.0)])
def test_a_reward_is_any_one_number(tmp_path: Path, reward: Any) -> None:
    save_run(tmp_path, leaf("observation", 2), name="mlp", lstm_size=4)
    policy = load_policy(tmp_path)
    rewards: list[Any] = []
    policy._network.register_forward_hook(lambda *called: rewards.append(called[1][0].previous_reward))
    policy(np.zeros(2, np.float32), reward=reward, is_first=False)
    assert rewards[0].tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (float("nan"), "reward must be finite as float32, not nan"),
        (1e300, r"reward must be finite as float32, not 1e\+300"),
        (np.ones(2), "reward must be one number, not array"),
        ("much", "reward must be one number, not 'much'"),
        (None, "reward must be"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_refused_in_words(
    tmp_path: Path, reward: Any, words: str
) -> None:
    save_run(tmp_path, leaf("observation", 2), name="mlp")
    with pytest.raises(ValueError, match=words):
        load_policy(tmp_path)(np.zeros(2, np.float32), reward=reward)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run with a checkpoint"):
        load_policy(tmp_path / "nowhere")


def test_one_checkpoint_is_taken_by_its_path(tmp_path: Path) -> None:
    spec = save_run(tmp_path / "run", leaf("observation", 2), name="mlp")
    directory = tmp_path / "run/checkpoints"
    (older,) = directory.iterdir()
    of_the_newer = {name: weight + 1 for name, weight in read_checkpoint(older).weights.items()}
    save_checkpoint(
        directory,
        spec=spec,
        weights=of_the_newer,
        optimizer_state={},
        counters={"updates": 2},
        rng={},
        keep=2,
    )
    copied = tmp_path / "elsewhere" / older.name
    shutil.copytree(older, copied)
    for path in (older, str(older), copied):
        weights = load_policy(path)._network.state_dict()
        assert all(torch.equal(weights[name] + 1, of_the_newer[name]) for name in of_the_newer)
    (older / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=f"{older.name} is damaged: model.safetensors does not match its hash"):
        load_policy(older)


def test_a_device_that_is_none_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path, leaf("observation", 2), name="mlp")
    with pytest.raises(ConfigurationError, match="device 'gpu'"):
        load_policy(tmp_path, device="gpu")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    spec = save_run(tmp_path, leaf("observation", 2), name="mlp")
    save_checkpoint(
        tmp_path / "checkpoints",
        spec=spec,
        weights={"other": torch.ones(1)},
        optimizer_state={},
        counters={"updates": 2},
        rng={},
        keep=2,
    )
    with pytest.raises(RunError, match=r"weights of another network: .*Missing key"):
        load_policy(tmp_path)
