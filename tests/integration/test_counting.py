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
import torch

from shared.types import Array, Chunk
from tests.support.commands import command, environment
from tests.support.counting import told
from tests.support.counting_environment import episode_length, reward_of
from tests.support.counting_group import LEAF, counting_spec
from tests.support.inference_service import InferenceRun, learner_side, running_inference
from tests.support.nats import NatsRun

LENGTHS = (5, 3, 1, 8)
UNROLL = 4
STACK = 3
CHUNKS_PER_STREAM = 12
LIFE_EVERY = 2


@contextlib.contextmanager
def actor(
    service: InferenceRun, cwd: Path, *, actor_id: str, groups: int, group_size: int, **kwargs: object
) -> Iterator[None]:
    """An actor process on counting environments; must exit with 0 when it is told to."""
    words = ("--inference-url", service.address, "--run-id", service.config.run_id, "--actor-id", actor_id)
    shape = ("--groups", str(groups), "--group-size", str(group_size), "--seed", "7")
    kind = "CountingVector-v0" if "life_every" in kwargs else "Counting-v0"
    env = f"tests.support.counting_environment:{kind}"
    process = subprocess.Popen(
        command("actor", env, *words, *shape, "--env-kwargs", orjson.dumps(kwargs).decode()),
        cwd=cwd,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        process.send_signal(signal.SIGTERM)
        _, words_said = process.communicate(timeout=15)
        assert process.returncode == 0, words_said
    finally:
        process.kill()


def test_row_numbers_are_what_the_checks_below_take_them_for() -> None:
    assert [episode_length(LENGTHS, episode) for episode in (1, 2, 3, 4, 5)] == [5, 3, 1, 8, 5]


async def test_every_chunk_of_real_actors_is_aligned(nats: NatsRun, tmp_path: Path) -> None:
    spec = counting_spec(unroll=UNROLL, frame_stack=STACK)
    async with (
        running_inference(nats, unroll=UNROLL, frame_stack=STACK, batch_size=8) as service,
        learner_side(nats, spec) as learner,
    ):
        await learner.publish()
        with (
            actor(service, tmp_path, actor_id="ends", groups=2, group_size=3),
            actor(service, tmp_path, actor_id="cut", groups=1, group_size=5, truncate=True),
            actor(service, tmp_path, actor_id="crashing", groups=1, group_size=2, crash_at=11),
            actor(service, tmp_path, actor_id="lives", groups=1, group_size=4, life_every=LIFE_EVERY),
        ):
            streams: dict[str, list[Chunk]] = defaultdict(list)
            while len(streams) < 5 or min(map(len, streams.values())) < CHUNKS_PER_STREAM:
                for chunk in await learner.chunks(4, timeout=40.0):
                    streams[chunk.header.stream_id].append(chunk)
    resets = 0
    for chunks in streams.values():
        crashing = chunks[0].header.actor_id == "crashing"
        for chunk in chunks:
            for row in range(chunk.rows):
                assert_row_follows_from_its_observations(chunk, row, crashing=crashing)
            resets += int(chunk.reset_steps.sum())
        assert_joined(chunks)
    assert resets > 100
    assert {chunk[0].header.group_size for chunk in streams.values()} == {2, 3, 4, 5}


def assert_row_follows_from_its_observations(chunk: Chunk, row: int, *, crashing: bool) -> None:
    """Checks one environment's part of a chunk by what its observations say of themselves."""
    observations = chunk.observation[LEAF][row]  # [T + 1, 3]: instance, episode, step
    first = chunk.is_first[row]
    np.testing.assert_array_equal(first, observations[:, 2] == 1)
    said = told(torch.tensor(chunk.behaviour_logits[row]), STACK)
    truncates = chunk.header.actor_id == "cut"
    for t in range(chunk.unroll):
        instance, episode, step = (int(value) for value in observations[t])
        action = int(chunk.action[row, t])
        # What the policy was given at t.
        assert int(said.count[t]) == step - 1
        assert (int(said.instance[t]), int(said.episode[t]), int(said.step[t])) == (instance, episode, step)
        assert said.stacked_steps[t].tolist() == [max(0, step - age) for age in reversed(range(STACK))]
        assert action == (instance + step - 1) % chunk.behaviour_logits.shape[-1]
        before = previous(chunk, row, t)
        assert (int(said.previous_action[t]), float(said.previous_reward[t])) == before
        # What followed the action.
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
