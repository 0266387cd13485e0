import asyncio
import gc
from typing import Any

import pytest
from nats import errors as nats_errors
from nats.aio.msg import Msg
from nats.js import api

from shared.bus import work_queue
from shared.bus.connection import Bus
from shared.bus.streams import stream_info
from shared.bus.work_queue import (
    QueueConsumer,
    QueueState,
    ensure_queue,
    publish_chunk,
    queue_state,
    still_queued,
)
from shared.errors import ChunkError, ConnectionFailed, QueueFull
from tests.support.nats import NatsRun, OwnNats
from tests.support.queue import fetch_all
from tests.support.waiting import eventually


async def size_of(bus: Bus) -> int | None:
    info = await stream_info(bus, bus.subjects.trajectories_stream)
    return info.config.max_msgs if info else None


async def test_messages_arrive_in_order_and_leave_the_queue_when_acknowledged(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        sequences = [await publish_chunk(bus, b"%d" % i, f"m/{i}") for i in range(3)]
        messages = await fetch_all(QueueConsumer(bus), 3)
        assert [message.data for message in messages] == [b"0", b"1", b"2"]
        assert [message.sequence for message in messages] == sequences == [1, 2, 3]
        assert not any(message.redelivered for message in messages)
        assert await queue_state(bus) == QueueState(last_sequence=3, messages=3)
        for left, message in zip([2, 1, 0], messages, strict=True):
            await message.ack()
            assert await queue_state(bus) == QueueState(last_sequence=3, messages=left)


async def test_a_full_queue_refuses_until_a_message_is_acknowledged(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 2)
        await publish_chunk(bus, b"0", "m/0")
        await publish_chunk(bus, b"1", "m/1")
        for _ in range(3):
            with pytest.raises(QueueFull):
                await publish_chunk(bus, b"2", "m/2")
        (message,) = await fetch_all(QueueConsumer(bus), 1)
        with pytest.raises(QueueFull):  # in hand is not out of the queue
            await publish_chunk(bus, b"2", "m/2")
        await message.ack()
        # What was refused three times is kept now, and not taken for a duplicate of itself.
        assert await publish_chunk(bus, b"2", "m/2") == 3
        assert await queue_state(bus) == QueueState(last_sequence=3, messages=2)


async def test_a_message_sent_twice_is_kept_once(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        first = await publish_chunk(bus, b"0", "m/0")
        assert await publish_chunk(bus, b"0", "m/0") == first
        (message,) = await fetch_all(QueueConsumer(bus), 1)
        await message.ack()
        assert await publish_chunk(bus, b"0", "m/0") == first  # also after it was taken
        assert await queue_state(bus) == QueueState(last_sequence=1, messages=0)


async def test_the_last_sequence_counts_exactly_what_was_kept(nats: NatsRun) -> None:
    """Refusals, duplicates and acknowledgements, from several publishers at once."""
    async with nats.bus() as bus:
        await ensure_queue(bus, 5)
        refused = 0

        async def publish(publisher: int) -> None:
            nonlocal refused
            for number in range(20):
                while True:
                    try:
                        await publish_chunk(bus, bytes(1000), f"{publisher}/{number}")
                        break
                    except QueueFull:
                        refused += 1
                        await asyncio.sleep(0.001)
                if number % 3 == 0:
                    await publish_chunk_again(publisher, number)

        async def publish_chunk_again(publisher: int, number: int) -> None:
            try:
                await publish_chunk(bus, bytes(1000), f"{publisher}/{number}")
            except QueueFull:
                pytest.fail("a duplicate is no new message")

        async def consume() -> list[int]:
            consumer, taken = QueueConsumer(bus), []
            while len(taken) < 60:
                for message in await consumer.fetch(3, timeout=5):
                    taken.append(message.sequence)
                    await message.ack()
            return taken

        *_, taken = await asyncio.gather(*(publish(i) for i in range(3)), consume())
        assert refused > 0
        assert taken == list(range(1, 61))
        assert await queue_state(bus) == QueueState(last_sequence=60, messages=0)


async def test_the_queue_knows_which_messages_it_holds(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        assert await still_queued(bus, [1]) == []  # no queue yet
        assert await queue_state(bus) == QueueState(0, 0)
        await ensure_queue(bus, 10)
        for i in range(4):
            await publish_chunk(bus, b"", f"m/{i}")
        messages = await fetch_all(QueueConsumer(bus), 3)
        await messages[1].ack()
        assert await still_queued(bus, range(6)) == [1, 3, 4]
        for message in messages:
            await message.ack()
        assert await still_queued(bus, range(6)) == [4]


async def test_a_message_is_gone_as_soon_as_its_acknowledgement_returns(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        consumer = QueueConsumer(bus)
        for i in range(200):
            sequence = await publish_chunk(bus, b"", f"m/{i}")
            (message,) = await fetch_all(consumer, 1)
            await message.ack()
            assert await still_queued(bus, [sequence]) == []


async def test_what_a_consumer_that_died_had_in_hand_comes_at_once_and_first(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        for number in range(5):
            await publish_chunk(bus, b"%d" % number, f"m/{number}")
        dead = QueueConsumer(bus)
        first, *_ = await fetch_all(dead, 3)
        await first.ack()
        heir = QueueConsumer(bus)
        await heir.take_over()
        messages = await asyncio.wait_for(fetch_all(heir, 4), work_queue.ACK_WAIT_SECONDS / 2)
        assert [message.data for message in messages] == [b"1", b"2", b"3", b"4"]
        assert [message.redelivered for message in messages] == [True, True, False, False]
        for message in messages:
            await message.ack()
        assert await queue_state(bus) == QueueState(last_sequence=5, messages=0)


async def test_what_comes_after_the_store_was_lost_was_delivered_to_nobody_before(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 10)
        for number in range(3):
            await publish_chunk(bus, b"", f"m/{number}")
        await fetch_all(QueueConsumer(bus), 3)
        heir = QueueConsumer(bus)
        await heir.take_over()
        await own_nats.lose_store()
        await bus.connected()
        await ensure_queue(bus, 10)
        for number in range(4):
            await publish_chunk(bus, b"", f"n/{number}")
        messages = await fetch_all(heir, 4)
        assert [(message.sequence, message.redelivered) for message in messages] == [
            (number, False) for number in (1, 2, 3, 4)
        ]


async def test_where_nobody_consumed_before_there_is_nothing_to_take_over(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        consumer = QueueConsumer(bus)
        await consumer.take_over()
        await ensure_queue(bus, 10)
        await consumer.take_over()
        await publish_chunk(bus, b"", "m")
        (message,) = await fetch_all(consumer, 1)
        assert not message.redelivered


async def test_a_queue_grows_and_never_shrinks(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        for wanted, size in [(3, 3), (10, 10), (5, 10)]:
            await ensure_queue(bus, wanted)
            assert await size_of(bus) == size
        await bus.js.delete_key_value(bus.subjects.bucket)  # nobody knows any more who wanted what
        await ensure_queue(bus, 5)
        assert await size_of(bus) == 10


async def test_the_queue_of_an_older_version_gets_the_present_duplicate_window(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 10)
        stream = bus.subjects.trajectories_stream
        before = await stream_info(bus, stream)
        assert before is not None
        await bus.js.update_stream(before.config.evolve(duplicate_window=120.0))
        sequence = await publish_chunk(bus, b"0", "m/0")
        await ensure_queue(bus, 5)
        after = await stream_info(bus, stream)
        assert after is not None
        assert after.config == before.config
        assert after.config.duplicate_window == work_queue.DUPLICATE_WINDOW_SECONDS == 1800
        assert await publish_chunk(bus, b"0", "m/0") == sequence  # what it knew, it still knows


async def test_many_who_make_the_queue_at_once_get_the_largest(nats: NatsRun) -> None:
    async with nats.bus() as one, nats.bus() as other:
        for round_ in range(5):
            wanted = [round_ * 20 + i for i in (7, 3, 19, 1, 12, 18)]
            await asyncio.gather(*(ensure_queue((one, other)[i % 2], size) for i, size in enumerate(wanted)))
            assert await size_of(one) == max(wanted)


async def test_who_enlarges_the_queue_by_an_old_view_of_it_does_not_shrink_it(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 5)
        seen = []

        async def seen_too_early(bus: Bus, stream: str) -> api.StreamInfo | None:
            info = await stream_info(bus, stream)
            if not seen:
                seen.append(info)
                await ensure_queue(bus, 20)  # another caller, between this one's reading and writing
            return info

        monkeypatch.setattr(work_queue, "stream_info", seen_too_early)
        await ensure_queue(bus, 10)
        assert await size_of(bus) == 20


async def test_max_msgs_is_the_only_limit_of_the_queue(nats: NatsRun) -> None:
    """With max_bytes beside it, the server acknowledges messages that it did not keep."""
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        info = await stream_info(bus, bus.subjects.trajectories_stream)
        assert info is not None
        assert (info.config.max_msgs, info.config.max_bytes, info.config.max_age) == (3, -1, 0)
        assert (info.config.retention, info.config.discard) == ("workqueue", "new")


async def test_a_message_too_large_for_the_server_is_refused_before_it_is_sent(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 1)
        with pytest.raises(ChunkError, match="takes 8,387,584 at most"):
            await publish_chunk(bus, bytes(bus.max_payload + 1), "m")
        await publish_chunk(bus, bytes(bus.max_payload), "m" * 512)
        assert bus.is_connected


async def test_what_a_dead_consumer_held_goes_to_the_next(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as heir:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"0", "m/0")
        dead = await fetch_all(QueueConsumer(bus, ack_wait=0.3), 1)
        (message,) = await fetch_all(QueueConsumer(heir, ack_wait=0.3), 1)
        assert (message.data, message.redelivered) == (b"0", True)
        assert dead[0].sequence == message.sequence


async def test_work_in_progress_is_not_given_to_another(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus() as other:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"0", "m/0")
        (message,) = await fetch_all(QueueConsumer(bus, ack_wait=1.5), 1)
        fetching = asyncio.create_task(QueueConsumer(other, ack_wait=1.5).fetch(1, timeout=4))
        while not fetching.done():
            await message.in_progress()
            await asyncio.wait({fetching}, timeout=0.1)
        assert fetching.result() == []
        await message.ack()


async def test_any_number_of_messages_may_be_in_hand(nats: NatsRun) -> None:
    """Also more than the thousand at which a consumer of NATS stops by default."""
    async with nats.bus() as bus:
        await ensure_queue(bus, 1100)
        for start in range(0, 1100, 100):
            await asyncio.gather(*(publish_chunk(bus, b"x", f"m/{start + i}") for i in range(100)))
        messages = await fetch_all(QueueConsumer(bus), 1100)
        assert [message.sequence for message in messages] == list(range(1, 1101))


async def test_a_message_in_hand_is_not_returned_twice(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"0", "m/0")
        consumer = QueueConsumer(bus, ack_wait=0.1)
        (message,) = await fetch_all(consumer, 1)
        assert await consumer.fetch(1, timeout=0.5) == []  # the server sent it again, several times
        await message.ack()
        assert await queue_state(bus) == QueueState(1, 0)


async def test_a_message_that_was_dropped_comes_again(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"0", "m/0")
        consumer = QueueConsumer(bus, ack_wait=0.1)
        await fetch_all(consumer, 1)
        gc.collect()
        (message,) = await fetch_all(consumer, 1)
        assert message.redelivered


async def test_a_message_given_back_comes_again_at_once(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"0", "m/0")
        consumer = QueueConsumer(bus)
        (message,) = await fetch_all(consumer, 1)
        await message.nak()
        (again,) = await asyncio.wait_for(fetch_all(consumer, 1), 5)  # not after ack_wait
        assert again.sequence == message.sequence


async def test_a_message_that_a_new_consumer_does_not_know_is_acknowledged_all_the_same(
    nats: NatsRun,
) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"", "m/0")
        (message,) = await fetch_all(QueueConsumer(bus), 1)
        stream, consumer = bus.subjects.trajectories_stream, bus.subjects.trajectories_consumer
        await bus.js.delete_consumer(stream, consumer)
        await bus.js.add_consumer(stream, durable_name=consumer)
        await asyncio.wait_for(message.ack(), 10)
        await message.ack()
        assert await queue_state(bus) == QueueState(last_sequence=1, messages=0)


async def test_an_acknowledgement_that_came_through_late_is_one(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nats.bus() as bus:
        await ensure_queue(bus, 3)
        for number in range(2):
            await publish_chunk(bus, b"", f"m/{number}")
        _, message = await fetch_all(QueueConsumer(bus), 2)
        request, requests = bus.nc.request, []

        async def late(subject: str, payload: bytes = b"", **options: Any) -> Msg:
            if payload == Msg.Ack.Ack:
                requests.append((subject, payload))
                raise nats_errors.TimeoutError
            if ".MSG.DELETE." in subject:
                for each in requests:
                    await request(*each)
            return await request(subject, payload, **options)

        monkeypatch.setattr(bus.nc, "request", late)
        await asyncio.wait_for(message.ack(), 10)
        assert requests
        assert await queue_state(bus) == QueueState(last_sequence=2, messages=1)


async def test_a_message_of_a_lost_store_is_not_taken_for_the_new_one_of_its_number(
    own_nats: OwnNats,
) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 10)
        for i in range(1, 5):
            await publish_chunk(bus, b"old %d" % i, f"old/{i}")
        consumer = QueueConsumer(bus, ack_wait=0.5)
        held = await fetch_all(consumer, 4)
        await own_nats.lose_store()
        await bus.connected()
        await ensure_queue(bus, 10)
        for i in range(1, 7):
            await publish_chunk(bus, b"new %d" % i, f"new/{i}")
        first = await fetch_all(consumer, 2)
        assert [message.data for message in first] == [b"new 5", b"new 6"]
        for message in held:
            await message.ack()
        assert await queue_state(bus) == QueueState(last_sequence=6, messages=6)
        del message
        held.clear()
        then = await fetch_all(consumer, 4)
        assert sorted(message.data for message in then) == [b"new %d" % i for i in range(1, 5)]
        for message in (*first, *then):
            await message.ack()
        assert await queue_state(bus) == QueueState(last_sequence=6, messages=0)


async def test_a_large_message_is_acknowledged_after_the_server_was_away(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus:
        await ensure_queue(bus, 3)
        await publish_chunk(bus, bytes(bus.max_payload), "m/0")
        (message,) = await fetch_all(QueueConsumer(bus), 1)
        await own_nats.kill()
        await own_nats.start()
        await asyncio.wait_for(message.ack(), 10)
        assert bus.is_connected
        assert await queue_state(bus) == QueueState(last_sequence=1, messages=0)


async def test_publishing_without_a_queue_is_trouble_that_passes(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        with pytest.raises(ConnectionFailed, match="nobody there answers"):
            await publish_chunk(bus, b"", "m")


async def test_two_runs_on_one_server_do_not_meet(nats: NatsRun) -> None:
    async with nats.bus() as bus, nats.bus(run_id=f"{nats.run_id}-2") as other:
        for each in (bus, other):
            await ensure_queue(each, 1)
        await publish_chunk(bus, b"mine", "m")
        assert await publish_chunk(other, b"theirs", "m") == 1  # neither full nor a duplicate
        for each, data in ((bus, b"mine"), (other, b"theirs")):
            (message,) = await fetch_all(QueueConsumer(each), 1)
            assert message.data == data
            await message.ack()
        await eventually(lambda: bus.is_connected)
