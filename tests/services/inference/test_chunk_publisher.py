"""Chunks on their way to the queue: nothing is lost while it is full, away or lost itself."""

import asyncio
import weakref
from time import monotonic

import grpc
import numpy as np
import pytest
from nats.aio.msg import Msg

from services.inference.assembler import Cut
from services.inference.chunk_publisher import ChunkPublisher
from services.inference.metrics import InferenceMetrics
from shared.bus.connection import Bus
from shared.bus.key_values import LEARNER_LEASE, held_lease
from shared.bus.work_queue import ensure_queue, queue_state
from shared.http import new_registry
from shared.types import Chunk, ChunkHeader
from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import (
    ActorStream,
    Ended,
    InferenceRun,
    groups,
    learner_side,
    running_inference,
)
from tests.support.nats import NatsRun, OwnNats
from tests.support.statuses import collect_statuses
from tests.support.waiting import eventually

UNROLL = 4
SPEC = counting_spec(unroll=UNROLL)
LONGEST_LOOK = 0.4  # seconds
THREE_MESSAGES = {"batch_size": 1, "max_queued_batches": 3}


async def has_grown(bus: Bus, sequence: int) -> bool:
    """Whether the queue has kept more than `sequence` messages."""
    return (await queue_state(bus)).last_sequence > sequence


async def withheld(service: InferenceRun, actor: ActorStream) -> "asyncio.Task[None]":
    """Plays on until the actions are held back; the task hears them."""
    while True:
        await actor.ask()
        heard = asyncio.create_task(_heard(actor))
        await asyncio.wait([heard], timeout=0.3)
        while not heard.done():  # it may be slow
            streams = {stream["stream_id"]: stream for stream in (await service.status())["streams"]}
            if streams[actor.group.stream_id]["withheld"]:
                return heard
            await asyncio.wait([heard], timeout=0.05)
        heard.result()


async def _heard(actor: ActorStream) -> None:
    await actor.heard()


async def test_a_full_queue_holds_actions_back_and_loses_nothing(nats: NatsRun) -> None:
    async with (
        running_inference(nats, step_timeout=0.5, **THREE_MESSAGES) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        heard = await withheld(service, actor)
        # Three chunks are kept, the fourth is refused for now, the fifth must wait for that.
        assert len(actor.group.observations) == 5 * UNROLL + 1
        assert (await queue_state(learner.bus)).last_sequence == 3
        assert await service.metric("publish_retries_total", reason="full") > 0
        await asyncio.wait([heard], timeout=2.3)
        assert not heard.done(), "waiting for room is not the actor's delay"
        assert (await service.status())["waiting"] == ["room in the work queue"]
        assert await service.metric("withheld_seconds_total") > 2.0, "not only afterwards"
        chunks = await learner.check_chunks(5, actor.group)
        await asyncio.wait_for(heard, 5)
        assert [chunk.header.number for chunk in chunks] == [0, 1, 2, 3, 4]
        await actor.play(UNROLL)
        await learner.check_chunks(1, actor.group)
        assert await service.metric("withheld_seconds_total") > 2.0
        assert (await service.status())["waiting"] == []


async def test_while_the_queue_is_full_no_group_steps_beyond_its_chunk_that_waits(nats: NatsRun) -> None:
    async with running_inference(nats, **THREE_MESSAGES) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        first = await withheld(service, await service.joined(CountingGroup(2)))

        async def is_full() -> bool:
            return await service.metric("publish_retries_total", reason="full") > 0

        await eventually(is_full)
        newcomer = await service.joined(CountingGroup(2, stream_id="b"))
        second = await withheld(service, newcomer)
        assert len(newcomer.group.observations) == UNROLL + 1
        for task in (first, second):
            task.cancel()


async def test_a_queue_that_is_full_for_long_is_asked_less_often(nats: NatsRun) -> None:
    async with running_inference(nats, **THREE_MESSAGES) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        asked: list[float] = []

        async def count(_: Msg) -> None:
            asked.append(monotonic())

        await learner.bus.nc.subscribe(
            f"$JS.API.STREAM.INFO.{learner.bus.subjects.trajectories_stream}", cb=count
        )
        heard = await withheld(service, actor)
        await eventually(lambda: len(asked) > 16)
        assert asked[10] - asked[0] < 10 * LONGEST_LOOK, "at first it is not known how long it takes"
        published = (await queue_state(learner.bus)).last_sequence
        await learner.check_chunks(1, actor.group)  # room for the chunk that waited; the next one waits now
        await eventually(lambda: has_grown(learner.bus, published))
        asked.clear()
        await eventually(lambda: len(asked) > 3)
        assert asked[3] - asked[1] > 1.9 * LONGEST_LOOK
        heard.cancel()


async def test_who_is_held_back_holds_nobody_up(nats: NatsRun) -> None:
    async with (
        running_inference(nats, max_batch_delay=3600.0, **THREE_MESSAGES) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        heard = await withheld(service, await service.joined(CountingGroup(2)))
        evaluated = await service.joined(CountingGroup(2, stream_id="e", role="eval"))
        await asyncio.wait_for(evaluated.play(3 * UNROLL), 5)
        assert not heard.done()
        heard.cancel()


async def test_chunks_of_many_groups_arrive_whole_through_a_queue_that_is_always_full(nats: NatsRun) -> None:
    async with running_inference(nats, **THREE_MESSAGES) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actors = [await service.joined(group) for group in groups(1, 2, 3, 1)]
        playing = asyncio.gather(*(actor.play(6 * UNROLL + 1) for actor in actors))
        chunks = []
        while len(chunks) < 24:
            chunks += await learner.check_chunks(1, *(actor.group for actor in actors))
            await asyncio.sleep(0.01)  # a slow learner, not a wait for something
        await playing
        for actor in actors:
            mine = [
                chunk.header.number for chunk in chunks if chunk.header.stream_id == actor.group.stream_id
            ]
            assert mine == list(range(6)), "in order"


async def test_inference_goes_on_without_nats_until_chunks_cannot_leave(own_nats: OwnNats) -> None:
    async with running_inference(own_nats.run) as service, learner_side(own_nats.run, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(UNROLL + 1)
        await service.counted("chunks_published_total", 1)
        await own_nats.kill()
        heard = await withheld(service, actor)
        assert len(actor.group.observations) == 3 * UNROLL + 1
        assert await service.reasons_not_ready() == [], "the run's spec is known, so Hello is accepted"
        assert (await service.status())["waiting"] == [f"NATS at nats://127.0.0.1:{own_nats.port}"]
        newcomer = await service.joined(CountingGroup(1, stream_id="e", role="eval"))
        await newcomer.play(2)
        await own_nats.start()
        chunks = await learner.check_chunks(3, actor.group)
        await asyncio.wait_for(heard, 10)
        assert [chunk.header.number for chunk in chunks] == [0, 1, 2]
        assert (await queue_state(learner.bus)).last_sequence == 3, "none was kept twice"


async def test_a_server_that_keeps_nothing_though_it_is_there_is_named(
    nats: NatsRun, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(UNROLL + 1)
        await service.counted("chunks_published_total", 1)
        stream = learner.bus.subjects.trajectories_stream
        config = (await learner.bus.js.stream_info(stream)).config
        # Messages larger than a byte are refused with an error, as a disk that is full does.
        await learner.bus.js.update_stream(config.evolve(max_msg_size=1))
        heard = await withheld(service, actor)

        async def is_said() -> bool:
            waiting = (await service.status())["waiting"]
            return any(words.startswith("NATS to keep chunks (the work queue: ") for words in waiting)

        await eventually(is_said)
        await learner.bus.js.update_stream(config)
        await asyncio.wait_for(heard, 5)
        await actor.play(UNROLL)
        assert (await service.status())["waiting"] == []
    assert capsys.readouterr().out.count("NATS keeps no chunks") == 1


async def test_a_server_that_has_answered_again_is_not_blamed_for_a_full_queue(nats: NatsRun) -> None:
    async with running_inference(nats, **THREE_MESSAGES) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(3 * UNROLL + 1)
        await service.counted("chunks_published_total", 3)
        stream = learner.bus.subjects.trajectories_stream
        config = (await learner.bus.js.stream_info(stream)).config
        await learner.bus.js.update_stream(config.evolve(max_msg_size=1))
        heard = await withheld(service, actor)

        async def waits_for(words: str) -> bool:
            waiting = (await service.status())["waiting"]
            return any(reason.startswith(words) for reason in waiting)

        await eventually(lambda: waits_for("NATS to keep chunks"))
        await learner.bus.js.update_stream(config)
        await eventually(lambda: waits_for("room in the work queue"))
        heard.cancel()


async def test_a_message_that_the_server_refuses_is_sent_ever_more_rarely(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 9)
        stream = bus.subjects.trajectories_stream
        config = (await bus.js.stream_info(stream)).config
        await bus.js.update_stream(config.evolve(max_msg_size=1))
        sent: list[float] = []

        async def count(_: Msg) -> None:
            sent.append(monotonic())

        await bus.nc.subscribe(bus.subjects.trajectories, cb=count)
        async with publishing(bus) as publisher:
            task = publisher.submit(cut(0), SPEC, rows_per_message=2, after=None)
            await eventually(lambda: len(sent) > 9)
            assert sent[5] - sent[0] < 1.0, "at first it may be over soon"
            assert sent[9] - sent[8] > 0.9
            await bus.js.update_stream(config)
            await asyncio.wait_for(task, 5)


async def test_a_queue_that_the_server_lost_is_made_again(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await learner.bus.js.delete_stream(learner.bus.subjects.trajectories_stream)
        await actor.play(UNROLL + 1)
        await learner.check_chunks(1, actor.group)


async def test_a_service_that_ends_does_not_wait_for_a_learner_that_is_gone(nats: NatsRun) -> None:
    async with (
        running_inference(nats, grace_seconds=60.0, **THREE_MESSAGES) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        (await withheld(service, actor)).cancel()
        statuses = asyncio.create_task(collect_statuses(learner.bus, 4.0))
        service.stop.set()
        await asyncio.wait_for(service.task, 1.8)  # of 60 s of grace
        assert (await queue_state(learner.bus)).last_sequence == 3
        chunks = await learner.check_chunks(3, actor.group)
        assert sum(chunk.steps for chunk in chunks) == actor.group.environment_steps(0, 3 * UNROLL)
        lost = actor.group.environment_steps(3 * UNROLL, 5 * UNROLL)
        assert [status["discarded_steps"] for status in await statuses] == [lost]


async def test_a_service_that_ends_waits_for_a_learner_that_is_busy(nats: NatsRun) -> None:
    async with (
        running_inference(nats, grace_seconds=60.0, **THREE_MESSAGES) as service,
        learner_side(nats, SPEC) as learner,
        held_lease(learner.bus, LEARNER_LEASE, "the test"),
    ):
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        (await withheld(service, actor)).cancel()
        service.stop.set()
        await asyncio.wait([service.task], timeout=1.0)
        assert not service.task.done()
        await learner.check_chunks(5, actor.group)
        await asyncio.wait_for(service.task, 5)


async def test_finished_chunks_of_a_stream_that_died_still_leave(nats: NatsRun) -> None:
    async with running_inference(nats, **THREE_MESSAGES) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        heard = await withheld(service, actor)
        heard.cancel()
        actor.break_off()

        async def is_gone() -> bool:
            return await service.metric("streams") == 0

        await eventually(is_gone)
        assert await service.metric("queued_publishes") == 2, "they are still on their way"
        await learner.check_chunks(5, actor.group)
        await service.counted("chunks_published_total", 5)
        assert await service.metric("discarded_steps_total") == 0


async def test_what_ended_streams_leave_is_bounded_and_accounted_for(nats: NatsRun) -> None:
    async with (
        running_inference(nats, max_environments=2, **THREE_MESSAGES) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        played: list[CountingGroup] = []

        async def replaced() -> None:
            """An actor comes, plays as long as it may and is gone again."""
            group = CountingGroup(2, stream_id=f"s{len(played)}")
            actor = await service.joined(group)
            played.append(group)
            (await withheld(service, actor)).cancel()
            actor.break_off()
            await service.counted("streams", 0)

        await replaced()
        with pytest.raises(Ended, match="backlog: chunks of 4 environments, also of ended streams") as ended:
            await replaced()
        assert ended.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await service.metric("queued_publishes") == 2
        assert await service.metric("refused_messages_total", reason="backlog") == 1
        evaluated = await service.joined(CountingGroup(2, stream_id="e", role="eval"))
        await evaluated.play(1)
        await evaluated.end()

        await learner.check_chunks(5, *played)  # three from the queue, then the two that waited
        await service.counted("queued_publishes", 0)
        await replaced()
        steps = (await service.status())["steps_total"]
        left = await learner.check_chunks(5, *played)
        assert {chunk.header.stream_id for chunk in left} == {played[-1].stream_id}
        await service.counted("queued_publishes", 0)
        chunks = await service.metric("chunks_published_total")
        published = sum(group.environment_steps(0, 5 * UNROLL) for group in played)
        assert (chunks, len(played)) == (10, 2)
        assert steps == published + await service.metric("discarded_steps_total")


async def test_an_encoded_chunk_that_waits_keeps_nothing_but_its_messages(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 1)
        async with publishing(bus) as publisher:
            await publisher.submit(cut(0), SPEC, rows_per_message=2, after=None)
            raw = cut(1)
            seen = weakref.ref(raw.chunk.observation["observation"])
            publisher.submit(raw, SPEC, rows_per_message=2, after=None)
            del raw
            await eventually(lambda: seen() is None)
            assert (publisher.queued, publisher.rows) == (1, 2)


def publishing(bus: Bus) -> ChunkPublisher:
    async def nothing() -> None:
        """The queue is there."""

    return ChunkPublisher(bus, InferenceMetrics(new_registry()), ensure_queue=nothing)


def cut(number: int) -> Cut:
    """A finished chunk of two environments without any episode's end."""
    steps, actions = (2, UNROLL), SPEC.environment.num_actions
    header = ChunkHeader(
        run_id="run",
        stream_id="s1",
        actor_id="a",
        task="t",
        network_hash=SPEC.network_hash,
        number=number,
        group_size=2,
        first_row=0,
    )
    chunk = Chunk(
        header=header,
        observation={"observation": np.zeros((2, UNROLL + 1, 3), np.float32)},
        history={},
        is_first=np.zeros((2, UNROLL + 1), np.bool_),
        action=np.zeros(steps, np.int64),
        reward=np.zeros(steps, np.float32),
        terminated=np.zeros(steps, np.bool_),
        truncated=np.zeros(steps, np.bool_),
        previous_action=np.zeros(2, np.int64),
        previous_reward=np.zeros(2, np.float32),
        state=(),
        weights_version=np.zeros(UNROLL, np.int64),
        weights_update=np.zeros(UNROLL, np.int64),
        behaviour_logits=np.zeros((*steps, actions), np.float32),
    )
    return Cut(chunk, None)
