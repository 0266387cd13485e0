"""What docs/networks.md shows works: its networks, their check, the policies and the commands."""

import re
import sys
from pathlib import Path

import gymnasium
import pytest
from gymnasium import Env

from services.actor.spaces import environment_spec
from shared.checkpoints import is_checkpoint, save_checkpoint
from shared.networks.build import build_network, check_contract
from shared.policy import load_policy
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from tests.support.commands import ROOT

DOCUMENT = (ROOT / "docs/networks.md").read_text()
NETS, CHECK, PLAY, ATARI, VIDEO = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.M | re.S)
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```$", DOCUMENT, re.M | re.S)).splitlines()


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's module lies in the working directory."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


def save_run(run_dir: Path, environment: EnvironmentSpec, *, updates: int = 1, **network: int | str) -> None:
    """A run whose weights are those that a training begins with."""
    spec = RunSpec(
        environment=environment,
        network=NetworkSpec(**network),  # type: ignore[arg-type]
        agent="vtrace",
        unroll=20,
        reward_clip=0.0,
    )
    weights = build_network(spec).state_dict()
    counters, directory = {"updates": updates}, run_dir / "checkpoints"
    save_checkpoint(
        directory, spec=spec, weights=weights, optimizer_state={}, counters=counters, rng={}, keep=9
    )


def pole() -> EnvironmentSpec:
    env: Env[object, object] = gymnasium.make("CartPole-v1")
    return environment_spec(env.observation_space, env.action_space)


def test_the_networks_keep_the_contract() -> None:
    exec(CHECK, {})


@pytest.mark.parametrize(
    ("name", "lstm_size", "agent"), [("Plain", 0, "vtrace"), ("Net", 32, "vtrace"), ("Net", 0, "r2d2")]
)
def test_the_learner_takes_the_networks(name: str, lstm_size: int, agent: Agent) -> None:
    network = NetworkSpec(name=f"my_nets:{name}", lstm_size=lstm_size)
    spec = RunSpec(environment=pole(), network=network, agent=agent, unroll=20, reward_clip=0.0)
    check_contract(spec, "bfloat16")


def test_a_policy_plays_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "runs/pole", pole(), name="my_nets:Net", lstm_size=32)
    exec(PLAY, {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_atari_policy_takes_the_newest_frame(tmp_path: Path) -> None:
    frame = LeafSpec(name="observation", dtype="uint8", shape=(1, 84, 84), low=(0.0,), high=(255.0,))
    environment = EnvironmentSpec(observation=(frame,), num_actions=6)
    save_run(tmp_path / "runs/pong", environment, name="impala_shallow", frame_stack=4)
    short = ATARI.replace("group_size=1", "group_size=1, env_kwargs={'max_num_frames_per_episode': 200}")
    exec(short, {})


def test_a_video_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    save_run(tmp_path / "runs/pole", pole(), name="my_nets:Plain")
    exec(VIDEO, {})
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_an_older_checkpoint_is_taken_by_its_path(tmp_path: Path) -> None:
    older = Path(SHELL[-1].split()[2])
    for updates in (int(older.name.partition("-")[2]), 275):
        save_run(tmp_path / "runs/pole", pole(), updates=updates, name="my_nets:Plain")
    assert is_checkpoint(older)
    (shown,) = re.findall(r'`load_policy\("(\S+/checkpoints/\S+)"\)`', DOCUMENT)
    assert Path(shown) == older
    load_policy(shown)
