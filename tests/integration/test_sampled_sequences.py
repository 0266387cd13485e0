"""Real inference and real replay: a sampled sequence is what the environment emitted, bit for bit.

The counting environment's history is known, and the counting network counts in its recurrent state, so that
a state stored one step early or late, or a sequence joined of two lives, shows as a wrong number.
"""

import asyncio
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.learner.sequences import Shape, staged_sequences
from shared.bus.replay import ReplayClient
from shared.networks.build import build_network
from shared.networks.interface import QOutput
from shared.types import Chunk
from tests.support.counting import Q_SCALE, told
from tests.support.counting_group import LEAF, CountingGroup, assert_chunk_is_right, counting_spec, seen
from tests.support.inference_service import InferenceRun, learner_side, running_inference
from tests.support.nats import NatsRun
from tests.support.replay_runs import FREE, Queue, replay_config, replaying

STACK = 3
SHAPE = Shape(unroll=4, burn_in=3, trained=8)  # burn-in ends within a chunk, and the last one is used in part
STRIDE = SHAPE.trained // SHAPE.unroll
SPEC = counting_spec(unroll=SHAPE.unroll, frame_stack=STACK, agent="r2d2")
LIVES = 3
SAMPLES = 3000

Place = tuple[str, int, int]  # stream, row, number of the first chunk


async def lived(service: InferenceRun, group: CountingGroup, steps: int) -> CountingGroup:
    """The group after it played `steps` and its actor was killed."""
    stream = await service.joined(group)
    await stream.play(steps)
    stream.break_off()
    return group


async def lives(service: InferenceRun) -> dict[str, CountingGroup]:
    """By stream, what came and went in the lives of three actors; each is restarted amid a chunk."""
    groups = {}
    for life in range(LIVES):
        fresh = [
            CountingGroup(
                rows, seed=10 * life + rows, stream_id=f"life-{life}-of-{rows}", actor_id=f"actor-{rows}"
            )
            for rows in (1, 3, 4)
        ]
        steps = (42, 51, 63)
        await asyncio.gather(*(lived(service, group, n) for group, n in zip(fresh, steps, strict=True)))
        groups.update({group.stream_id: group for group in fresh})
    return groups


async def test_a_sampled_sequence_is_what_the_environment_emitted_and_its_state_that_before_burn_in(
    nats: NatsRun, tmp_path: Path
) -> None:
    network = SPEC.network
    settings: dict[str, Any] = {
        "agent": "r2d2",
        "network": network.name,
        "lstm_size": network.lstm_size,
        "hidden_sizes": network.hidden_sizes,
        "frame_stack": STACK,
        "unroll": SHAPE.unroll,
        "discount": SPEC.discount,
        "n_steps": SPEC.n_steps,
    }
    # All are drawn alike, so that each of them is drawn.
    table: dict[str, Any] = {"replay_capacity": SAMPLES, "priority_exponent": 0.0, **FREE}
    lengths = {"burn_in": SHAPE.burn_in, "sequence_length": SHAPE.trained}
    async with (
        nats.bus() as bus,
        replaying(replay_config(nats, tmp_path, **settings, **lengths, **table)) as replay,
        running_inference(nats, batch_size=8, **settings) as service,
        learner_side(nats, SPEC) as learner,
        asyncio.timeout(60),
    ):
        await learner.publish()
        groups = await lives(service)
        chunks = sum((len(group.observations) - 1) // SHAPE.unroll for group in groups.values())
        await service.counted("chunks_published_total", chunks)
        await Queue(bus).emptied()
        sample = await ReplayClient(bus).sample(SAMPLES)
        await replay.stopped()
        accounts = await Queue(bus).exact_accounts(tmp_path)
    assert (accounts.inserted, accounts.accounted) == (chunks, chunks)
    headers = [sequence[0].header for sequence in sample.sequences]
    found = {
        (header.stream_id, header.first_row, header.number): sequence
        for header, sequence in zip(headers, sample.sequences, strict=True)
    }
    assert found.keys() == expected_places(groups)
    assert sample.size == len(found)
    for (stream_id, row, number), sequence in found.items():
        for each, chunk in enumerate(sequence, number):
            header = chunk.header
            assert (header.stream_id, header.first_row, header.number) == (stream_id, row, each)
            assert_chunk_is_right(chunk, groups[stream_id], SPEC)
    assert_joined_as_lived(found, groups)
    assert_the_network_sees_what_it_saw(found, groups)


def expected_places(groups: dict[str, CountingGroup]) -> set[Place]:
    """Where sequences start, by definition: all that end before their actor's end."""
    places = set()
    for stream_id, group in groups.items():
        chunks = (len(group.observations) - 1) // SHAPE.unroll
        assert (len(group.observations) - 1) % SHAPE.unroll  # it was killed amid a chunk
        starts = range(0, chunks - SHAPE.chunks + 1, STRIDE)
        places |= {(stream_id, row, number) for row, number in itertools.product(range(group.rows), starts)}
    return places


def assert_joined_as_lived(found: dict[Place, list[Chunk]], groups: dict[str, CountingGroup]) -> None:
    """The learner's batch of all sequences is the history, over chunk borders and the ends of episodes."""
    batch = staged_sequences(
        list(found.values()), np.ones(len(found)), SHAPE, reward_clip=0.0, device=torch.device("cpu")
    )
    borders: Counter[int] = Counter()
    for column, (stream_id, row, number) in enumerate(found):
        group, begin = groups[stream_id], number * SHAPE.unroll
        times = range(begin, begin + SHAPE.steps)
        for field, record, shift in (
            (batch.action, group.actions, 0),
            (batch.reward, group.rewards, 1),
            (batch.terminated, group.terminated, 1),
            (batch.reset_steps, group.is_first, 1),
        ):
            assert field[:, column].tolist() == [record[t + shift][row] for t in times]
        frames = batch.inputs.observation[LEAF][:, column, -1].tolist()
        assert frames == [group.observations[t][row].tolist() for t in [*times, times.stop]]
        firsts = batch.inputs.is_first[:, column].tolist()
        assert firsts == [group.is_first[t][row] for t in [*times, times.stop]]
        borders.update(offset for offset, first in enumerate(firsts) if first)
    assert borders.keys() >= set(range(SHAPE.steps + 1))  # episodes start at every place of a sequence


def assert_the_network_sees_what_it_saw(
    found: dict[Place, list[Chunk]], groups: dict[str, CountingGroup]
) -> None:
    """From the stored state on, the counting network counts as it did when it acted."""
    batch = staged_sequences(
        list(found.values()), np.ones(len(found)), SHAPE, reward_clip=0.0, device=torch.device("cpu")
    )
    with torch.no_grad():
        output, _ = build_network(SPEC)(batch.inputs, batch.state)
    assert isinstance(output, QOutput)
    said = told(output.q_values * Q_SCALE, STACK)
    carried = 0
    for column, (stream_id, row, number) in enumerate(found):
        group, begin = groups[stream_id], number * SHAPE.unroll
        (stored,) = batch.state[0][column].tolist()
        assert stored == group.observations[begin][row][2] - 1  # steps of the episode before this one
        carried += stored > 0
        for offset in range(SHAPE.steps + 1):
            count, action, reward, frames = seen(group, row, begin + offset, STACK)
            values = (said.count, said.previous_action, said.previous_reward)
            assert [float(value[offset, column]) for value in values] == [count, action, reward]
            assert said.stacked_steps[offset, column].tolist() == [frame[2] for frame in frames]
    assert carried > len(found) / 3
