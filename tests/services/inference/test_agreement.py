import asyncio
from typing import Any

import grpc
import pytest

from services.inference import agreement
from services.inference.chunk_publisher import even_parts
from services.inference.service import run
from shared.bus.connection import Bus
from shared.bus.key_values import create_spec, wait_for_spec
from shared.bus.streams import run_bucket, stream_info
from shared.errors import ConfigurationError
from shared.specs import RunSpec
from shared.types import Chunk
from shared.wire.hello import to_proto_observation
from tests.support.counting_group import CountingGroup, counting_spec
from tests.support.inference_service import (
    Ended,
    groups,
    inference_config,
    learner_side,
    running_inference,
)
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

SPEC = counting_spec(unroll=4, reward_clip=1.0)


async def queue_size(bus: Bus) -> int | None:
    info = await stream_info(bus, bus.subjects.trajectories_stream)
    return info.config.max_msgs if info else None


async def test_the_first_hello_makes_the_runs_spec(nats: NatsRun) -> None:
    async with running_inference(nats, reward_clip=1.0) as service, nats.bus() as bus:
        await asyncio.gather(*(service.joined(group) for group in groups(2, 3, 1)))
        assert await wait_for_spec(bus) == SPEC


async def test_first_hellos_are_all_answered_in_time_while_nats_stands_still(
    own_nats: OwnNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_inference(own_nats.run) as service:
        own_nats.freeze()
        streams = [service.stream(group) for group in groups(1, 1, 1, 1, 1, 1)]
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "HELLO_SECONDS", 1.0)
            async with asyncio.timeout(4.0):
                answers = await asyncio.gather(
                    *(stream.hello() for stream in streams), return_exceptions=True
                )
        assert [answer.code for answer in answers if isinstance(answer, Ended)] == [
            grpc.StatusCode.UNAVAILABLE
        ] * 6
        own_nats.thaw()
        await service.joined(CountingGroup(1, stream_id="late"))


async def test_auto_is_resolved_in_the_spec(nats: NatsRun) -> None:
    async with running_inference(nats, network="auto", hidden_sizes=(8,)) as service, nats.bus() as bus:
        await service.joined(CountingGroup(1))
        assert (await wait_for_spec(bus)).network.name == "mlp"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unroll": 9}, "unroll is 9, the run's is 4"),
        ({"frame_stack": 2}, "network frame_stack is 2, the run's is 1"),
        ({"network": "mlp"}, "network name is mlp, the run's is tests.support.counting:CountingNetwork"),
        ({"reward_clip": 0.0}, "reward_clip is 0.0, the run's is 1.0"),
    ],
)
async def test_a_service_whose_settings_are_not_the_runs_ends(
    nats: NatsRun, settings: dict[str, Any], words: str
) -> None:
    async with nats.bus() as bus:
        await create_spec(bus, SPEC)
    config = inference_config(nats, **{"reward_clip": 1.0, **settings})
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(run(config, stop=asyncio.Event()), 10)
    mistakes = ended.value.exceptions
    assert [type(mistake) for mistake in mistakes] == [ConfigurationError]
    assert words in str(mistakes[0])


async def test_a_service_ends_when_another_one_settles_the_run_otherwise(nats: NatsRun) -> None:
    async def other_service() -> None:
        async with running_inference(nats) as service, nats.bus() as bus:
            await create_spec(bus, SPEC)
            await asyncio.wait_for(service.task, 10)

    with pytest.raises(ExceptionGroup) as ended:
        await other_service()
    assert isinstance(ended.value.exceptions[0], ConfigurationError)


async def test_a_network_that_does_not_fit_the_first_environment_refuses_it_and_makes_no_spec(
    nats: NatsRun,
) -> None:
    async with running_inference(nats, network="impala_shallow") as service:
        with pytest.raises(Ended, match="impala_shallow needs an image"):
            await service.joined(CountingGroup(1))
        assert (await service.status())["waiting"] == ["actors"]


async def test_a_group_too_large_for_one_message_sends_its_rows_in_several_in_order(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_at_most(spec: RunSpec, shapes: Any, group_size: int, max_payload: int) -> int:
        return min(2, group_size)

    monkeypatch.setattr(agreement, "rows_per_message", two_at_most)
    small_queue = {"batch_size": 1, "max_queued_batches": 3}  # so that chunks wait for each other
    async with (
        running_inference(nats, **small_queue) as service,
        learner_side(nats, counting_spec(unroll=4)) as learner,
    ):
        await learner.publish()
        actor = await service.joined(CountingGroup(5))
        playing = asyncio.create_task(actor.play(13))
        await service.counted("queued_publishes", 2)
        chunks: list[Chunk] = []
        for _ in range(9):
            chunks += await learner.check_chunks(1, actor.group)
        await playing
        assert [(chunk.header.number, chunk.header.first_row, chunk.rows) for chunk in chunks] == [
            (number, first, rows) for number in (0, 1, 2) for first, rows in ((0, 1), (1, 2), (3, 2))
        ]


@pytest.mark.parametrize(
    ("group_size", "most", "parts"),
    [
        (55, 54, [27, 28]),
        (32, 32, [32]),
        (10, 4, [3, 3, 4]),
        (5, 2, [1, 2, 2]),
        (31, 6, [5, 5, 5, 5, 5, 6]),
        (64, 7, [6] * 6 + [7] * 4),
    ],
)
def test_a_groups_messages_are_of_nearly_the_same_size(group_size: int, most: int, parts: list[int]) -> None:
    """A queue full of one-row rests would hold less than a batch, and nobody could go on."""
    assert even_parts(group_size, most) == parts


async def test_the_queue_holds_the_batches_it_is_said_to_and_grows_for_smaller_groups(nats: NatsRun) -> None:
    settings = {"batch_size": 8, "max_queued_batches": 3}
    async with running_inference(nats, **settings) as service, nats.bus() as bus:
        await service.joined(CountingGroup(8, stream_id="e", role="eval"))
        assert await queue_size(bus) is None
        for rows, messages in ((8, 4), (3, 9), (8, 9), (1, 25)):
            await service.joined(CountingGroup(rows, stream_id=f"s{rows}-{messages}"))
            await eventually(lambda: queue_size(bus), what="a queue")
            assert await queue_size(bus) == messages


async def test_the_spaces_of_the_run_outlive_the_service(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await create_spec(bus, SPEC)
    async with running_inference(nats, reward_clip=1.0) as service:
        leaves = to_proto_observation(SPEC.environment)
        leaves[0].name = "other"
        with pytest.raises(Ended, match="observation is"):
            await service.stream(CountingGroup(1)).hello(observation=leaves)
        await service.joined(CountingGroup(1, stream_id="s2"))


async def test_spec_and_queue_come_back_when_the_server_lost_them(own_nats: OwnNats) -> None:
    async with running_inference(own_nats.run, reward_clip=1.0) as service, own_nats.bus() as bus:
        await service.joined(CountingGroup(2))
        size = await queue_size(bus)
        await own_nats.lose_store()
        async with asyncio.timeout(20):
            assert await wait_for_spec(bus) == SPEC
        await eventually(lambda: queue_size(bus))
        assert await queue_size(bus) == size


async def test_a_service_ends_when_its_run_has_got_another_spec(nats: NatsRun) -> None:
    async def service_of_a_run_begun_anew() -> None:
        async with running_inference(nats, reward_clip=1.0) as service, nats.bus() as bus:
            await service.joined(CountingGroup(2))
            await (await run_bucket(bus)).put("spec", counting_spec(unroll=9).to_json())
            await asyncio.wait_for(service.task, 10)

    with pytest.raises(ExceptionGroup) as ended:
        await service_of_a_run_begun_anew()
    assert isinstance(ended.value.exceptions[0], ConfigurationError)
    assert "unroll is 4, the run's is 9" in str(ended.value.exceptions[0])
