"""Real actors, real inference, real NATS: every number of every chunk follows from the observations in it.

The counting environment's observation says which episode and step it is, and the counting network tells in
its logits what it was given, so that a shift by one anywhere between them shows as a wrong number.
"""

import contextlib
import itertools
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from shared.specs import Agent, RunSpec
from shared.types import Array, Chunk
from tests.support.commands import command, environment
from tests.support.counting import Q_SCALE, told
from tests.support.counting_environment import episode_length, reward_of
from tests.support.counting_group import LEAF, counting_spec
from tests.support.inference_service import InferenceRun, learner_side, running_inference
from tests.support.nats import NatsRun
from tests.support.returns import td_errors

LENGTHS = (5, 3, 1, 8)
UNROLL = 4
STACK = 3
CHUNKS_PER_STREAM = 12
LIFE_EVERY = 2


@contextlib.contextmanager
def actor(
    service: InferenceRun,
    cwd: Path,
    *,
    actor_id: str,
    groups: int,
    group_size: int,
    killed: bool = False,
    shared_memory: bool = True,
    **kwargs: object,
) -> Iterator[None]:
    """An actor process on counting environments; must exit with 0 when it is told to, unless it is killed."""
    words = ("--inference-url", service.address, "--run-id", service.config.run_id, "--actor-id", actor_id)
    shape = ("--groups", str(groups), "--group-size", str(group_size), "--seed", "7")
    transport = "--shared-memory" if shared_memory else "--no-shared-memory"
    kind = "CountingVector-v0" if "life_every" in kwargs else "Counting-v0"
    env = f"tests.support.counting_environment:{kind}"
    process = subprocess.Popen(
        command("actor", env, *words, *shape, transport, "--env-kwargs", orjson.dumps(kwargs).decode()),
        cwd=cwd,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        if killed:
            return
        process.send_signal(signal.SIGTERM)
        _, words_said = process.communicate(timeout=15)
        assert process.returncode == 0, words_said
    finally:
        process.kill()
        process.communicate()


def test_row_numbers_are_what_the_checks_below_take_them_for() -> None:
    assert [episode_length(LENGTHS, episode) for episode in (1, 2, 3, 4, 5)] == [5, 3, 1, 8, 5]


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
async def test_every_chunk_of_real_actors_is_aligned(nats: NatsRun, tmp_path: Path, agent: Agent) -> None:
    spec = counting_spec(unroll=UNROLL, frame_stack=STACK, agent=agent)
    of_agent = {"agent": agent, "network": spec.network.name, "discount": 0.9, "n_steps": 3}
    async with (
        running_inference(nats, unroll=UNROLL, frame_stack=STACK, batch_size=8, **of_agent) as service,
        learner_side(nats, spec) as learner,
    ):
        await learner.publish()
        with (
            actor(service, tmp_path, actor_id="ends", groups=2, group_size=3),
            actor(
                service, tmp_path, actor_id="cut", groups=1, group_size=5, truncate=True, shared_memory=False
            ),
            actor(service, tmp_path, actor_id="crashing", groups=1, group_size=2, crash_at=11),
            actor(service, tmp_path, actor_id="lives", groups=1, group_size=4, life_every=LIFE_EVERY),
        ):
            streams: dict[str, list[Chunk]] = defaultdict(list)
            while len(streams) < 5 or min(map(len, streams.values())) < CHUNKS_PER_STREAM:
                for chunk in await learner.chunks(4, timeout=40.0):
                    streams[chunk.header.stream_id].append(chunk)
            status = await service.status()
    shares_memory = {stream["actor_id"]: stream["shared_memory"] for stream in status["streams"]}
    assert shares_memory == {"ends": True, "cut": False, "crashing": True, "lives": True}
    resets = 0
    for chunks in streams.values():
        crashing = chunks[0].header.actor_id == "crashing"
        for chunk in chunks:
            for row in range(chunk.rows):
                assert_row_follows_from_its_observations(chunk, row, crashing=crashing)
                if agent == "r2d2":
                    assert_td_errors_follow_from_the_observations(chunk, row, spec)
                else:
                    assert_the_policy_told_what_it_saw(chunk, row)
            resets += int(chunk.reset_steps.sum())
        assert_joined(chunks)
    assert resets > 100
    assert {chunk[0].header.group_size for chunk in streams.values()} == {2, 3, 4, 5}


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
async def test_an_actor_that_is_killed_and_started_again_begins_with_nothing(
    nats: NatsRun, tmp_path: Path, agent: Agent
) -> None:
    spec = counting_spec(unroll=UNROLL, frame_stack=STACK, agent=agent)
    of_agent = {"agent": agent, "network": spec.network.name, "discount": 0.9, "n_steps": 3}
    async with (
        running_inference(nats, unroll=UNROLL, frame_stack=STACK, batch_size=8, **of_agent) as service,
        learner_side(nats, spec) as learner,
    ):
        await learner.publish()
        streams: dict[str, list[Chunk]] = defaultdict(list)
        for life in range(2):
            with actor(service, tmp_path, actor_id=f"life {life}", groups=1, group_size=3, killed=True):
                mine: list[Chunk] = []
                while len(mine) < 4:
                    (chunk,) = await learner.chunks(1, timeout=40.0)
                    streams[chunk.header.stream_id].append(chunk)
                    mine += [chunk] if chunk.header.actor_id == f"life {life}" else []
    assert len(streams) == 2
    for chunks in streams.values():
        first = chunks[0]
        assert first.is_first[:, 0].all()
        assert not any(each.any() for each in (first.state[0], first.previous_action, first.previous_reward))
        assert not first.history[LEAF].any()
        for chunk in chunks:
            for row in range(chunk.rows):
                assert_row_follows_from_its_observations(chunk, row, crashing=False)
                if agent == "r2d2":
                    assert_td_errors_follow_from_the_observations(chunk, row, spec)
                else:
                    assert_the_policy_told_what_it_saw(chunk, row)
        assert_joined(chunks)


def assert_the_policy_told_what_it_saw(chunk: Chunk, row: int) -> None:
    """V-trace: the counting network's logits are recorded, and it acts with certainty."""
    said = told(torch.tensor(chunk.behaviour_logits[row]), STACK)
    for t in range(chunk.unroll):
        instance, episode, step = (int(value) for value in chunk.observation[LEAF][row, t])
        assert int(said.count[t]) == step - 1
        assert (int(said.instance[t]), int(said.episode[t]), int(said.step[t])) == (instance, episode, step)
        assert said.stacked_steps[t].tolist() == [max(0, step - age) for age in reversed(range(STACK))]
        assert int(chunk.action[row, t]) == (instance + step - 1) % chunk.behaviour_logits.shape[-1]
        before = previous(chunk, row, t)
        assert (int(said.previous_action[t]), float(said.previous_reward[t])) == before


def assert_td_errors_follow_from_the_observations(chunk: Chunk, row: int, spec: RunSpec) -> None:
    """R2D2: what the counting network said at every time is known from the observations alone."""
    actions = spec.environment.num_actions
    q_values = np.zeros((chunk.unroll + 1, actions), np.float32)
    for t, (instance, episode, step) in enumerate(chunk.observation[LEAF][row]):
        q_values[t, :6] = [step - 1, instance, episode, step, *previous(chunk, row, t)]
        q_values[t, 6 : 6 + STACK] = [max(0, step - age) for age in reversed(range(STACK))]
        q_values[t, int(instance + step - 1) % actions] += 65536.0
    values = (q_values / Q_SCALE).tolist()
    expected = td_errors(
        online_q=values,
        target_q=values,
        actions=chunk.action[row].tolist(),
        rewards=chunk.reward[row].tolist(),
        discounts=np.where(chunk.terminated[row], 0.0, spec.discount).tolist(),
        reset_steps=chunk.reset_steps[row].tolist(),
        n=spec.n_steps,
    )
    assert chunk.td_errors is not None
    np.testing.assert_allclose(chunk.td_errors[row], expected, rtol=2e-6, atol=2e-5)


def assert_row_follows_from_its_observations(chunk: Chunk, row: int, *, crashing: bool) -> None:
    """Checks one environment's part of a chunk by what its observations say of themselves."""
    observations = chunk.observation[LEAF][row]  # [T + 1, 3]: instance, episode, step
    first = chunk.is_first[row]
    np.testing.assert_array_equal(first, observations[:, 2] == 1)
    truncates = chunk.header.actor_id == "cut"
    for t in range(chunk.unroll):
        instance, episode, step = (int(value) for value in observations[t])
        action = int(chunk.action[row, t])
        is_reset = bool(first[t + 1])
        ends = not is_reset and int(observations[t + 1, 2]) == episode_length(LENGTHS, episode) + 1
        if is_reset:
            assert chunk.reward[row, t] == 0
            finished = step == episode_length(LENGTHS, episode) + 1
            assert finished or crashing
        else:
            assert chunk.reward[row, t] == np.float32(reward_of(observations[t], action))
            assert observations[t + 1].tolist() == [instance, episode, step + 1]
        life_lost = chunk.header.actor_id == "lives" and not is_reset and step % LIFE_EVERY == 0
        assert bool(chunk.terminated[row, t]) == ((ends and not truncates) or life_lost)
        assert bool(chunk.truncated[row, t]) == (ends and truncates)
    step = int(observations[0, 2])
    assert chunk.state[0][row].tolist() == [step - 1]
    history: Array = chunk.history[LEAF][row]
    assert history[:, 2].tolist() == [max(0, step - age) for age in reversed(range(1, STACK))]


def previous(chunk: Chunk, row: int, t: int) -> tuple[int, float]:
    """Action and reward before `t`, zero where an episode starts."""
    if chunk.is_first[row, t]:
        return 0, 0.0
    if t == 0:
        return int(chunk.previous_action[row]), float(chunk.previous_reward[row])
    return int(chunk.action[row, t - 1]), float(chunk.reward[row, t - 1])


def assert_joined(chunks: list[Chunk]) -> None:
    """Consecutive chunks of a stream: row T is row 0 of the next, whose other inputs came before."""
    assert [chunk.header.number for chunk in chunks] == list(range(len(chunks)))
    for chunk, following in itertools.pairwise(chunks):
        np.testing.assert_array_equal(chunk.observation[LEAF][:, -1], following.observation[LEAF][:, 0])
        first = following.is_first[:, 0]
        np.testing.assert_array_equal(chunk.is_first[:, -1], first)
        np.testing.assert_array_equal(following.previous_action, np.where(first, 0, chunk.action[:, -1]))
        np.testing.assert_array_equal(following.previous_reward, np.where(first, 0, chunk.reward[:, -1]))
