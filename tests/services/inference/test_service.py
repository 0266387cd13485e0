"""The whole service over its real interfaces: gRPC, HTTP and a real nats-server."""

import asyncio

import grpc
import pytest
from structlog.testing import capture_logs

from services.inference.service import run
from shared.bus.control import request_control
from shared.bus.episodes import EpisodeConsumer
from shared.bus.key_values import kept_paused
from shared.errors import ConfigurationError, Refused
from tests.support.counting import CountingNetwork
from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import (
    Ended,
    groups,
    inference_config,
    learner_side,
    running_inference,
)
from tests.support.nats import NatsRun, OwnNats
from tests.support.promtool import assert_clean_metrics
from tests.support.statuses import collect_statuses
from tests.support.waiting import eventually

UNROLL = 4
SPEC = counting_spec(unroll=UNROLL)


@pytest.mark.parametrize("frame_stack", [1, 4])
async def test_what_actors_play_arrives_in_the_queue(nats: NatsRun, frame_stack: int) -> None:
    spec = counting_spec(unroll=UNROLL, frame_stack=frame_stack)
    async with (
        running_inference(nats, frame_stack=frame_stack) as service,
        learner_side(nats, spec) as learner,
    ):
        version = await learner.publish(update=30)
        actors = [await service.joined(group) for group in groups(3, 1, 4)]
        playing = asyncio.gather(*(actor.play(4 * UNROLL + 1) for actor in actors))
        chunks = await learner.check_chunks(12, *(actor.group for actor in actors))
        await playing
        assert {(chunk.header.stream_id, chunk.header.number) for chunk in chunks} == {
            (f"s{index}", number) for index in range(3) for number in range(4)
        }
        assert all((chunk.weights_version == version).all() for chunk in chunks)
        assert all((chunk.weights_update == 30).all() for chunk in chunks)
        assert all(chunk.header.task == "Counting-v0" for chunk in chunks)
        await service.counted("chunks_published_total", 12)
        status = await service.status()
        assert status["steps_total"] == sum(chunk.steps for chunk in chunks)
        assert status["discarded_steps"] == 0
        assert status["waiting"] == []
        assert [stream["rows"] for stream in status["streams"]] == [3, 1, 4]
        steps = sum(stream["steps"] for stream in status["streams"])
        assert status["actors"] == {"a": {"groups": 3, "environments": 8, "steps": steps}}


async def test_streams_wait_for_the_first_weights(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        assert (await service.status())["waiting"] == ["actors"]
        actor = await service.joined(CountingGroup(2))
        await actor.ask()
        assert (await service.status())["waiting"] == ["weights"]
        assert await service.metric("batches_total") == 0
        await learner.publish()
        await actor.heard()
        assert (await service.status())["waiting"] == []
        await actor.end()

        async def waits_for_actors() -> bool:
            return (await service.status())["waiting"] == ["actors"]

        await eventually(waits_for_actors)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [({}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "inference_token": "secret"}, False)],
)
async def test_it_says_where_anybody_may_act(nats: NatsRun, settings: dict[str, str], warns: bool) -> None:
    with capture_logs() as logs:
        async with running_inference(nats, wait=False, **settings):
            pass
    assert any("no SEEDRL_INFERENCE_TOKEN" in each["event"] for each in logs) is warns


async def test_weights_of_another_network_are_refused_and_newer_ones_used(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        first = await learner.publish(update=1)
        actor = await service.joined(CountingGroup(2))
        await actor.ask()
        assert (await actor.heard()).weights_version == first
        await learner.publish(update=2, network_hash="another")
        await service.counted("refused_weights_total", 1)
        await learner.publish(update=2, data=b"no weights at all")
        await service.counted("refused_weights_total", 2)
        assert (await service.status())["waiting"] == []  # it acts with those that it has
        await actor.ask()
        assert (await actor.heard()).weights_version == first
        second = await learner.publish(update=3)
        await service.counted("weights_version", second)
        await actor.ask()
        assert (await actor.heard()).weights_version == second
        assert (await service.status())["weights_update"] == 3


async def test_it_says_why_the_weights_for_which_it_waits_were_refused(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        actor = await service.joined(CountingGroup(2))
        await actor.ask()
        await learner.publish(network_hash="another")
        await service.counted("refused_weights_total", 1)
        (words,) = (await service.status())["waiting"]
        assert words.startswith("weights (refused: weights of network another")
        await learner.publish()
        await actor.heard()
        assert (await service.status())["waiting"] == []


async def test_it_says_why_the_weights_for_which_it_waits_cannot_be_read(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.bus.js.delete_msg(learner.bus.subjects.weights_stream, await learner.publish() - 1)
        actor = await service.joined(CountingGroup(2))
        await actor.ask()

        async def says_why() -> bool:
            return (await service.status())["waiting"] == ["weights (NATS lost parts of them)"]

        await eventually(says_why)
        await learner.publish()
        await actor.heard()
        assert (await service.status())["waiting"] == []


async def test_finished_episodes_are_published_with_their_role(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        train, evaluated = (
            CountingGroup(2, seed=index, stream_id=role, role=role)
            for index, role in enumerate(("train", "eval"))
        )
        actors = [await service.joined(group) for group in (train, evaluated)]
        steps = 12 * UNROLL + 1
        playing = asyncio.gather(*(actor.play(steps) for actor in actors))
        chunks = await learner.check_chunks(12, train)
        await playing
        assert {chunk.header.stream_id for chunk in chunks} == {"train"}
        expected = {
            (group.stream_id, group.role, *episode)
            for group in (train, evaluated)
            for episode in group.finished_episodes()
        }
        assert len(expected) > 10
        consumer, found = EpisodeConsumer(learner.bus), set()
        while len(found) < len(expected):
            for each in await consumer.fetch(timeout=5.0):
                assert (each["actor_id"], each["task"]) == ("a", "Counting-v0")
                found.add((each["stream_id"], each["role"], each["row"], each["return"], each["length"]))
        assert found == expected
        status = await service.status()
        assert status["episodes"] == {
            "train": len(train.finished_episodes()),
            "eval": len(evaluated.finished_episodes()),
        }
        assert status["eval_steps_total"] == evaluated.environment_steps(0, steps - 1)


async def test_a_restarted_service_goes_on_with_the_runs_spec_and_weights(nats: NatsRun) -> None:
    async with learner_side(nats, SPEC) as learner:
        async with running_inference(nats) as service:
            await learner.publish(update=5)
            await (await service.joined(CountingGroup(2))).play(2)
        async with running_inference(nats) as service:
            await service.counted("weights_update", 5)
            group = CountingGroup(2, stream_id="s2")
            actor = await service.joined(group)
            playing = asyncio.create_task(actor.play(2 * UNROLL + 1))
            await learner.check_chunks(2, group)
            await playing


async def test_pausing_withholds_actions_and_does_not_count_as_the_actors_delay(nats: NatsRun) -> None:
    async with running_inference(nats, step_timeout=0.5) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(2)
        replies = await request_control(learner.bus, "pause", timeout=5)
        assert [reply["service"] for reply in replies] == ["inference"]
        status = await service.status()
        assert status["paused"]
        assert status["waiting"] == ["resume (the run is paused)"]
        await actor.ask()
        heard = asyncio.create_task(actor.heard())
        await asyncio.wait([heard], timeout=1.5)
        assert not heard.done()
        await request_control(learner.bus, "resume", timeout=5)
        await asyncio.wait_for(heard, 5)
        status = await service.status()
        assert not status["paused"]
        assert status["waiting"] == []
        await actor.play(1)


async def test_a_pause_outlasts_every_service_that_was_told_of_it(nats: NatsRun) -> None:
    async with learner_side(nats, SPEC) as learner, running_inference(nats) as other:
        version = await learner.publish()
        await (await other.joined(CountingGroup(2))).play(2)
        async with running_inference(nats) as service:
            await request_control(learner.bus, "pause", timeout=5)
            assert (await service.status())["paused"]
            assert (await other.status())["paused"]
        async with running_inference(nats) as service:
            actor = await service.joined(CountingGroup(2))
            await service.counted("weights_version", version)
            await actor.ask()
            assert (await service.status())["waiting"] == ["resume (the run is paused)"]
            heard = asyncio.create_task(actor.heard())
            await asyncio.wait([heard], timeout=0.5)
            assert not heard.done()
            await request_control(learner.bus, "resume", timeout=5)
            await asyncio.wait_for(heard, 5)
            assert not (await other.status())["paused"]
        async with running_inference(nats) as service:
            await (await service.joined(CountingGroup(2))).play(2)


async def test_a_pause_outlasts_the_store_of_nats(nats: NatsRun) -> None:
    async with learner_side(nats, SPEC) as learner, running_inference(nats) as service:
        await learner.publish()
        await (await service.joined(CountingGroup(2))).play(2)
        await request_control(learner.bus, "pause", timeout=5)
        await learner.bus.js.delete_key_value(learner.bus.subjects.bucket)
        await eventually(lambda: kept_paused(learner.bus), what="the pause to be kept again")
        await request_control(learner.bus, "resume", timeout=5)
        assert not await kept_paused(learner.bus)


async def test_a_run_that_was_stopped_while_it_was_paused_goes_on_when_it_starts_again(nats: NatsRun) -> None:
    async with learner_side(nats, SPEC) as learner:
        await learner.publish()
        async with running_inference(nats) as service:
            await (await service.joined(CountingGroup(2))).play(2)
            await request_control(learner.bus, "pause", timeout=5)
            await request_control(learner.bus, "stop", timeout=5)
            await asyncio.wait_for(service.task, 10)
        async with running_inference(nats) as service:
            await (await service.joined(CountingGroup(2))).play(2)


async def test_stopping_the_run_ends_every_stream_with_ok_and_then_the_service(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actors = [await service.joined(group) for group in groups(2, 1)]
        await actors[0].play(2)
        replies = await request_control(learner.bus, "stop", timeout=5)
        assert "ended 2 streams" in replies[0]["done"]
        for actor in actors:
            with pytest.raises(Ended) as ended:
                await actor.receive()
            assert ended.value.code is grpc.StatusCode.OK
        late = service.stream(CountingGroup(1, stream_id="late"))
        with pytest.raises(Ended) as ended:
            await late.hello()
        assert ended.value.code is grpc.StatusCode.OK
        await asyncio.wait_for(service.task, 10)


async def test_at_sigterm_streams_end_as_unavailable_and_their_chunks_are_published(nats: NatsRun) -> None:
    async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(UNROLL + 1)
        service.stop.set()
        with pytest.raises(Ended) as ended:
            await actor.receive()
        assert ended.value.code is grpc.StatusCode.UNAVAILABLE
        assert ended.value.details == "shutting down"
        await learner.check_chunks(1, actor.group)
        await asyncio.wait_for(service.task, 10)


async def test_the_last_status_knows_what_was_lost(nats: NatsRun) -> None:
    async with running_inference(nats, grace_seconds=1.0) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(2))
        await actor.play(UNROLL)
        statuses = asyncio.create_task(collect_statuses(learner.bus, 2.5))
        await asyncio.sleep(0)
        await service.end()
        lost = actor.group.environment_steps(0, UNROLL - 1)
        assert lost
        assert [status["discarded_steps"] for status in await statuses] == [lost]


async def test_a_group_that_dies_frees_its_slots_and_its_unfinished_steps_are_counted(nats: NatsRun) -> None:
    async with running_inference(nats, max_environments=4) as service, learner_side(nats, SPEC) as learner:
        await learner.publish()
        actor = await service.joined(CountingGroup(4))
        await actor.play(UNROLL + 3)
        actor.break_off()
        await service.counted("discarded_steps_total", actor.group.environment_steps(UNROLL, UNROLL + 2))
        assert await service.metric("streams") == 0
        assert await service.metric("environments") == 0
        await (await service.joined(CountingGroup(4, stream_id="s2"))).play(1)


async def test_nobody_waits_for_a_stream_that_died(nats: NatsRun) -> None:
    async with (
        running_inference(nats, max_batch_delay=3600.0) as service,
        learner_side(nats, SPEC) as learner,
    ):
        await learner.publish()
        alive, dead = [await service.joined(group) for group in groups(2, 1)]
        await alive.ask()
        heard = asyncio.create_task(alive.heard())
        await asyncio.wait([heard], timeout=0.3)
        assert not heard.done(), "the other one is awaited"
        dead.break_off()
        await asyncio.wait_for(heard, 5)


async def test_actors_of_any_order_wait_for_nats(own_nats: OwnNats) -> None:
    await own_nats.stop()
    async with running_inference(own_nats.run, wait=False) as service:
        assert await service.reasons_not_ready() == [f"NATS at nats://127.0.0.1:{own_nats.port}"]
        early = service.stream(CountingGroup(2))
        with pytest.raises(Ended, match="waiting for NATS") as ended:
            await early.hello()
        assert ended.value.code is grpc.StatusCode.UNAVAILABLE
        await own_nats.start()

        async def ready() -> bool:
            return not await service.reasons_not_ready()

        await eventually(ready)
        await service.joined(CountingGroup(2))


async def test_metrics_are_as_prometheus_likes_them(nats: NatsRun) -> None:
    async with running_inference(nats) as service:
        exposition = await service.exposition()
        assert_clean_metrics(exposition)
        assert 'seedrl_inference_refused_messages_total{reason="garbage"} 0.0' in exposition
        assert 'refused_messages_total{reason="token"}' not in exposition  # a refused connection


async def test_a_wrong_token_ends_the_service(nats: NatsRun) -> None:
    config = inference_config(NatsRun(nats.url, "wrong", nats.run_id))
    with pytest.raises(Refused, match="token"):
        await asyncio.wait_for(run(config, stop=asyncio.Event()), 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "resnet99"}, "unknown network 'resnet99'"),
        ({"device": "cuda:7"}, "device cuda:7"),
    ],
)
async def test_settings_that_can_never_work_end_the_service(
    nats: NatsRun, settings: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await asyncio.wait_for(run(inference_config(nats, **settings), stop=asyncio.Event()), 10)


async def test_a_network_that_fails_ends_the_service_with_its_error(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ArithmeticError("a network of one's own")

    async def scenario() -> None:
        async with running_inference(nats) as service, learner_side(nats, SPEC) as learner:
            await learner.publish()
            actor = await service.joined(CountingGroup(2))
            monkeypatch.setattr(CountingNetwork, "forward", broken)
            await actor.ask()
            with pytest.raises(Ended, match="shutting down"):
                await actor.heard()

    with pytest.raises(ExceptionGroup) as ended:
        await scenario()
    (error,) = ended.value.exceptions
    assert (
        str(error)
        == "network tests.support.counting:CountingNetwork: ArithmeticError: a network of one's own"
    )
    assert isinstance(error.__cause__, ArithmeticError)
