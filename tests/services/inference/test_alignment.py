"""Groups, batching, the model and the chunks together, without gRPC and NATS: does every number belong?"""

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from services.inference.batcher import Batcher
from services.inference.dispatcher import Answer, Dispatcher
from services.inference.group import Group
from services.inference.metrics import InferenceMetrics
from services.inference.model import Answers, Model, PackedBatch
from services.inference.session import read_hello
from services.inference.slots import SlotAllocator
from services.inference.staging import StagingPool
from services.inference.td_errors import completed
from shared.algorithms.exploration import EVALUATION_EPSILON, epsilon_ladder
from shared.networks.build import build_network
from shared.specs import Agent, RunSpec
from shared.types import Chunk
from tests.support.counting_group import CountingGroup, assert_chunk_is_right, counting_spec, told_logits


class Player(NamedTuple):
    """An actor's side and inference's side of one group."""

    actor: CountingGroup
    group: Group
    chunks: list[Chunk]


class World:
    """Groups on one model, in batches that are made by hand."""

    on_host = True  # groups stack frames, where the policy finds them; otherwise it stacks what it is sent

    def __init__(self, spec: RunSpec, *, max_batch_size: int = 8, slots: int = 64) -> None:
        self.spec = spec
        self.frames_in_place = self.on_host and spec.network.frame_stack > 1
        self.slots = SlotAllocator(slots)
        self.metrics = InferenceMetrics(CollectorRegistry())
        self.model = Model(
            spec,
            build_network(spec),
            device=torch.device("cpu"),
            precision="float32",
            seed=0,
            frames_in_place=self.frames_in_place,
        )
        self.model.weights_version, self.model.weights_update = 7, 70
        self.dispatcher = Dispatcher(
            run=self._run,
            pool=StagingPool(
                spec.environment, rows=max_batch_size, pinned=False, in_place=self.frames_in_place
            ),
            batcher=Batcher(max_batch_size=max_batch_size, max_batch_delay=10.0),
            metrics=self.metrics,
        )

    def _run(self, batch: PackedBatch) -> "asyncio.Future[Answers]":
        future: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        future.set_result(self.model.run(batch))
        return future

    def join(self, actor: CountingGroup) -> Player:
        introduction = read_hello(actor.hello(run_id="r"), run_id="r")
        slots = self.slots.allocate(actor.rows)
        assert slots is not None
        group = Group(introduction, spec=self.spec, slots=slots, frames_in_place=self.frames_in_place)
        return Player(actor, group, [])

    def leave(self, player: Player) -> None:
        self.dispatcher.forget(player.group)
        self.slots.release(player.group.slots)

    def ask(self, player: Player) -> "asyncio.Future[Answer]":
        player.actor.advance()
        step, _ = player.group.observe(player.actor.step())
        return self.dispatcher.ask(player.group, step)

    def take(self, player: Player, answer: Answer) -> None:
        player.actor.actions.append(answer.action)
        cut = player.group.act(answer)
        if cut is not None:
            player.chunks.append(completed(cut, self.spec))

    async def play(self, players: list[Player]) -> None:
        """One step of these groups, in as few batches as they fit."""
        for player in players:
            self.dispatcher.expect(player.group)
        futures = [self.ask(player) for player in players]
        for player, future in zip(players, futures, strict=True):
            self.take(player, await asyncio.wait_for(future, 1))


@pytest.fixture(autouse=True, params=[True, False], ids=["host", "device"])
def _where_the_policy_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "on_host", request.param)


@pytest.fixture(autouse=True)
def _autocast_is_left() -> Iterator[None]:
    yield
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("unroll", [1, 5])
@pytest.mark.parametrize("reward_clip", [0.0, 1.5])
async def test_every_number_of_every_chunk_belongs_where_it_is(
    frame_stack: int, unroll: int, reward_clip: float, agent: Agent
) -> None:
    spec = counting_spec(unroll=unroll, frame_stack=frame_stack, reward_clip=reward_clip, agent=agent)
    world = World(spec)
    rng = np.random.default_rng(frame_stack + 10 * unroll)
    players = [
        world.join(CountingGroup(rows, seed=index, stream_id=f"s{index}"))
        for index, rows in enumerate([3, 1, 4, 2])
    ]
    for _ in range(120):
        await world.play([players[index] for index in rng.permutation(len(players))[: rng.integers(1, 5)]])
    world.model.close()
    for player in players:
        count = (len(player.actor.observations) - 1) // unroll
        assert [chunk.header.number for chunk in player.chunks] == list(range(count))
        assert count * unroll > 20
        for chunk in player.chunks:
            assert_chunk_is_right(chunk, player.actor, spec)
            assert set(chunk.weights_version) == {7}
            assert set(chunk.weights_update) == {70}
        published = sum(chunk.steps for chunk in player.chunks)
        assert published == player.actor.environment_steps(0, count * unroll)
        assert player.group.unfinished_steps == player.actor.environment_steps(
            count * unroll, len(player.actor.observations) - 1
        )
        assert player.group.steps == published + player.group.unfinished_steps


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
async def test_groups_that_come_and_go_leave_no_trace_in_the_slots_of_others(agent: Agent) -> None:
    spec = counting_spec(unroll=3, frame_stack=4, agent=agent)
    world = World(spec, slots=12)
    rng = np.random.default_rng(1)
    live: list[Player] = []
    gone: list[Player] = []
    scattered = 0
    for number in range(60):
        if live and rng.random() < 0.6:
            gone.append(live.pop(int(rng.integers(len(live)))))
            world.leave(gone[-1])
        rows = int(rng.integers(1, 5))
        if rows <= world.slots.free:
            live.append(world.join(CountingGroup(rows, seed=number, stream_id=f"s{number}")))
            slots = live[-1].group.slots
            scattered += int(slots[-1] - slots[0] >= rows)
        for _ in range(3):
            await world.play(live)
    world.model.close()
    assert scattered > 3
    for player in gone + live:
        for chunk in player.chunks:
            assert_chunk_is_right(chunk, player.actor, spec)


@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
async def test_a_group_that_dies_in_a_waiting_batch_takes_only_its_own_rows_along(agent: Agent) -> None:
    spec = counting_spec(unroll=2, agent=agent)
    world = World(spec, max_batch_size=16)
    players = [world.join(CountingGroup(rows, seed=rows, stream_id=f"s{rows}")) for rows in (1, 2, 3, 4)]
    for player in players:
        world.dispatcher.expect(player.group)
    futures = [world.ask(player) for player in players[:3]]
    world.leave(players[1])
    await asyncio.sleep(0)
    assert not any(future.done() for future in futures)
    futures.append(world.ask(players[3]))
    for index in (0, 2, 3):
        world.take(players[index], await asyncio.wait_for(futures[index], 1))
    assert world.metrics.batches.total == 1
    assert world.metrics.rows.total == 8
    alive = [players[0], players[2], players[3]]
    for _ in range(6):
        await world.play(alive)
    world.model.close()
    for player in alive:
        assert len(player.chunks) == 3
        for chunk in player.chunks:
            assert_chunk_is_right(chunk, player.actor, spec)


async def test_an_eval_group_gets_no_chunks_and_loses_no_steps() -> None:
    world = World(counting_spec(unroll=2))
    player = world.join(CountingGroup(2, role="eval"))
    for _ in range(7):
        await world.play([player])
    world.model.close()
    assert player.chunks == []
    assert player.group.unfinished_steps == 0
    assert player.group.steps == player.actor.environment_steps(0, 6)


async def test_each_step_of_a_chunk_names_the_weights_that_chose_its_action() -> None:
    world = World(counting_spec(unroll=3))
    player = world.join(CountingGroup(2))
    for step in range(7):
        world.model.weights_version, world.model.weights_update = step, 10 * step
        await world.play([player])
    world.model.close()
    assert [chunk.weights_version.tolist() for chunk in player.chunks] == [[0, 1, 2], [3, 4, 5]]
    assert [chunk.weights_update.tolist() for chunk in player.chunks] == [[0, 10, 20], [30, 40, 50]]


async def test_episodes_are_counted_from_the_raw_rewards() -> None:
    world = World(counting_spec(unroll=2, reward_clip=1.0))
    player = world.join(CountingGroup(3, seed=4))
    episodes = []
    for _ in range(100):
        world.dispatcher.expect(player.group)
        player.actor.advance()
        step, ended = player.group.observe(player.actor.step())
        episodes += ended
        world.take(player, await asyncio.wait_for(world.dispatcher.ask(player.group, step), 1))
    world.model.close()
    assert sorted((each["row"], each["return"], each["length"]) for each in episodes) == sorted(
        player.actor.finished_episodes()
    )
    assert len(episodes) > 10
    assert {each["weights_version"] for each in episodes} == {7}
    assert {(each["role"], each["task"], each["actor_id"]) for each in episodes} == {
        ("train", "Counting-v0", "a")
    }


def greedy_share(player: Player, spec: RunSpec) -> NDArray[np.float64]:
    """[B] how often each row did what the counting network thinks best."""
    best = [
        [told_logits(player.actor, row, t, spec).argmax() for row in range(player.actor.rows)]
        for t in range(len(player.actor.actions))
    ]
    share: NDArray[np.float64] = (np.array(best) == np.array(player.actor.actions)).mean(axis=0)
    return share


@pytest.mark.parametrize("frame_stack", [1, 4])
async def test_an_eval_group_takes_the_best_action_for_all_frames_that_it_saw(frame_stack: int) -> None:
    spec = counting_spec(unroll=2, frame_stack=frame_stack)
    world = World(spec)
    player = world.join(CountingGroup(3, role="eval", seed=2))
    for _ in range(60):
        await world.play([player])
    world.model.close()
    assert greedy_share(player, spec).tolist() == [1.0] * 3


async def test_each_row_of_a_group_explores_as_its_rung_of_the_ladder_says() -> None:
    spec = counting_spec(agent="r2d2")
    world = World(spec, max_batch_size=16)
    players = [world.join(CountingGroup(rows, seed=rows, stream_id=f"s{rows}")) for rows in (5, 1)]
    evaluated = world.join(CountingGroup(3, role="eval", stream_id="eval"))
    for _ in range(1500):
        await world.play([*players, evaluated])
    world.model.close()
    others = 1 - 1 / spec.environment.num_actions  # a random action may be the best one
    for player in players:
        expected = 1 - others * epsilon_ladder(player.actor.rows)
        np.testing.assert_allclose(greedy_share(player, spec), expected, atol=0.045)
    assert evaluated.group.epsilon.tolist() == [EVALUATION_EPSILON] * 3
    np.testing.assert_allclose(greedy_share(evaluated, spec), 1.0, atol=0.006)


async def test_where_epsilon_is_zero_only_the_best_action_is_taken_whatever_the_others_of_a_batch_do() -> (
    None
):
    spec = counting_spec(agent="r2d2")
    world = World(spec, max_batch_size=16)
    players = [world.join(CountingGroup(4, seed=seed, stream_id=f"s{seed}")) for seed in (1, 2)]
    players[0].group.epsilon[:] = [0.0, 1.0, 0.0, 1.0]
    players[1].group.epsilon[:] = 0.0
    for _ in range(300):
        await world.play(players)
    world.model.close()
    share = greedy_share(players[0], spec)
    assert share[[0, 2]].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(share[[1, 3]], 1 / spec.environment.num_actions, atol=0.06)
    assert greedy_share(players[1], spec).tolist() == [1.0] * 4


async def test_rows_behind_a_group_that_died_in_a_waiting_batch_keep_their_own_epsilon() -> None:
    spec = counting_spec(agent="r2d2")
    world = World(spec, max_batch_size=16)
    dead, alive = (world.join(CountingGroup(4, seed=seed, stream_id=f"s{seed}")) for seed in (1, 2))
    dead.group.epsilon[:] = 1.0
    alive.group.epsilon[:] = 0.0
    waits = world.join(CountingGroup(1, seed=3, stream_id="s3"))
    for player in (dead, alive, waits):
        world.dispatcher.expect(player.group)
    for _ in range(20):
        futures = [world.ask(player) for player in (dead, alive)]
        world.leave(dead)
        world.take(alive, await asyncio.wait_for(asked(world, waits, futures[1]), 1))
        dead = world.join(CountingGroup(4, seed=1, stream_id="s1"))
        dead.group.epsilon[:] = 1.0
        world.dispatcher.expect(dead.group)
        world.dispatcher.expect(alive.group)
        world.dispatcher.expect(waits.group)
    world.model.close()
    assert greedy_share(alive, spec).tolist() == [1.0] * 4


async def asked(world: World, player: Player, future: "asyncio.Future[Answer]") -> Answer:
    """The answer to another's request, for which this player's was awaited."""
    mine = world.ask(player)
    world.take(player, await mine)
    return await future
