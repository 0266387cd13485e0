import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from nats.errors import NoRespondersError

from services import nats_server
from shared.bus import replay_serving
from shared.bus.connection import Bus
from shared.bus.replay import ReplayClient, ReplaySample
from shared.bus.replay_serving import serve_replay
from shared.errors import ChunkError, ConnectionFailed, Refused, RunError
from shared.types import Array, Chunk
from shared.wire.chunk_rows import split_message
from shared.wire.chunks import decode_chunk, encode_chunk, slice_rows
from shared.wire.replay import SampleAnswer, encode_priorities, is_part
from tests.support.chunks import assert_same_chunk, make_chunk, make_run_spec
from tests.support.nats import NatsRun, OwnNats
from tests.support.waiting import eventually

SPEC = make_run_spec([("pixels", "uint8", (40, 40))], unroll=5, frame_stack=2, agent="r2d2")


class Table:
    """Answers as a replay would, from a few chunks; holds samples back until `free` is set."""

    def __init__(self) -> None:
        messages = [
            encode_chunk(
                make_chunk(SPEC, [((8,), "float32")], rows=3, seed=number, header={"number": number})
            )
            for number in range(2)
        ]
        self.chunks: list[Chunk] = [decode_chunk(message) for message in messages]
        self.records = [split_message(message).records for message in messages]
        self.free = asyncio.Event()
        self.free.set()
        self.asked = 0
        self.cancelled = 0
        self.damaged = False
        self.updates: list[tuple[Array, Array]] = []
        self.snapshots: list[str] = []
        self.written: list[str] = []
        self.refusals: list[str] = []
        self.failure: Exception | None = None

    async def sample(self, count: int) -> SampleAnswer:
        self.asked += 1
        self._fail()
        if count > 1000:
            raise Refused(f"a batch of {count} sequences, the table holds 1,000")
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        rows = [[records[item % 3] for records in self.records] for item in range(count)]
        if self.damaged:
            rows[0][1] = rows[0][1][:-1]
        return SampleAnswer(np.arange(count, dtype=np.uint64) << 32, np.full(count, 0.25), 1000, rows)

    async def update(self, keys: Array, priorities: Array) -> dict[str, int]:
        self._fail()
        self.updates.append((keys, priorities))
        return {"applied": len(keys)}

    async def snapshot(self, name: str) -> dict[str, Any]:
        self._fail()
        self.snapshots.append(name)
        await self.free.wait()
        self.written.append(name)
        return {"name": name, "items": 1000, "bytes": 7, "seconds": 0.5}

    def sequences_of(self, size: int) -> int:
        """How many sequences take more than `size` bytes."""
        return size // sum(len(records[0]) for records in self.records) + 1

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    def assert_sampled(self, sample: ReplaySample, count: int) -> None:
        assert sample.keys.tolist() == [item << 32 for item in range(count)]
        assert sample.probabilities.tolist() == [0.25] * count
        assert sample.size == 1000
        assert len(sample.sequences) == count
        for item, sequence in enumerate(sample.sequences):
            for part, chunk in zip(sequence, self.chunks, strict=True):
                assert_same_chunk(part, slice_rows(chunk, item % 3, item % 3 + 1))


@asynccontextmanager
async def serving(bus: Bus, table: Table) -> AsyncIterator[None]:
    async with serve_replay(
        bus,
        on_sample=table.sample,
        on_priorities=table.update,
        on_snapshot=table.snapshot,
        on_refusal=table.refusals.append,
    ):
        yield


async def within(awaitable: Any, seconds: float = 60) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable


@asynccontextmanager
async def asking(awaitable: Any) -> AsyncIterator["asyncio.Task[Any]"]:
    task = asyncio.ensure_future(awaitable)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_sequences_come_back_bit_for_bit(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        table.assert_sampled(await within(ReplayClient(learner).sample(4)), 4)


async def test_an_answer_larger_than_a_message_comes_in_parts(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        count = table.sequences_of(2 * bus.max_payload)
        table.assert_sampled(await within(ReplayClient(learner).sample(count)), count)


async def test_parts_fit_what_a_server_bears_whatever_its_max_payload(
    own_nats: OwnNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    await own_nats.stop()
    monkeypatch.setattr(nats_server, "MAX_PAYLOAD_BYTES", 64 * 2**20)
    await own_nats.start()
    table = Table()
    async with own_nats.bus() as bus, own_nats.bus() as learner:
        largest: list[int] = []
        request = bus.nc.request

        async def measured(subject: str, payload: bytes, **arguments: Any) -> Any:
            largest.append(len(payload))
            return await request(subject, payload, **arguments)

        monkeypatch.setattr(bus.nc, "request", measured)
        async with serving(bus, table):
            count = table.sequences_of(9 * 2**20)
            table.assert_sampled(await within(ReplayClient(learner).sample(count)), count)
        assert 8 * max(largest) < 64 * 2**20


async def test_a_sample_is_waited_for_while_replay_withholds_it(nats: NatsRun) -> None:
    table = Table()
    table.free.clear()
    async with (
        nats.bus() as bus,
        nats.bus() as learner,
        serving(bus, table),
        asking(ReplayClient(learner).sample(2)) as sample,
    ):
        await eventually(lambda: table.asked == 1)
        assert not (await asyncio.wait({sample}, timeout=2.5))[0]  # longer than two words that say so
        table.free.set()
        table.assert_sampled(await within(sample), 2)
        assert table.asked == 1


async def test_two_clients_and_two_calls_of_one_are_answered_apart(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as one, nats.bus() as two, serving(bus, table):
        clients = ReplayClient(one), ReplayClient(one), ReplayClient(two)
        counts = [1, 5, 9] * 4
        asked = (clients[number % 3].sample(count) for number, count in enumerate(counts))
        for count, sample in zip(counts, await within(asyncio.gather(*asked)), strict=True):
            table.assert_sampled(sample, count)


async def test_a_client_that_went_away_is_not_waited_for(nats: NatsRun) -> None:
    table = Table()
    table.free.clear()
    async with nats.bus() as bus, serving(bus, table), nats.bus() as other:
        async with nats.bus() as learner, asking(ReplayClient(learner).sample(2)):
            await eventually(lambda: table.asked == 1)
        await eventually(lambda: table.cancelled == 1)
        table.free.set()
        table.assert_sampled(await within(ReplayClient(other).sample(1)), 1)


async def test_a_client_is_there_before_replay(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, asking(ReplayClient(learner).sample(2)) as sample:
        assert not (await asyncio.wait({sample}, timeout=0.5))[0]
        async with serving(bus, table):
            table.assert_sampled(await within(sample), 2)


async def test_a_replay_that_starts_again_is_asked_again(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.bus.replay.SILENCE_SECONDS", 2.0)
    table, second = Table(), Table()
    table.free.clear()
    async with nats.bus() as learner:
        async with nats.bus() as bus, serving(bus, table):
            sample = asyncio.ensure_future(ReplayClient(learner).sample(2))
            await eventually(lambda: table.asked == 1)
        async with nats.bus() as bus, serving(bus, second):
            second.assert_sampled(await within(sample), 2)


async def test_samples_survive_a_restart_of_nats_in_the_middle(own_nats: OwnNats) -> None:
    table = Table()
    table.free.clear()
    async with (
        own_nats.bus() as bus,
        own_nats.bus() as learner,
        serving(bus, table),
        asking(ReplayClient(learner).sample(2)) as sample,
    ):
        await eventually(lambda: table.asked == 1)
        await own_nats.kill()
        await eventually(lambda: not learner.is_connected and not bus.is_connected)
        await own_nats.start()
        await eventually(lambda: table.asked == 2)
        await eventually(lambda: table.cancelled == 1)  # the attempt before: nobody takes its answer
        table.free.set()
        table.assert_sampled(await within(sample), 2)


async def test_nats_is_killed_between_the_parts_of_an_answer(own_nats: OwnNats) -> None:
    table = Table()
    killed: list[asyncio.Task[None]] = []

    async def kill_at_a_part(message: Any) -> None:
        if is_part(message.data) and not killed:
            killed.append(asyncio.create_task(own_nats.kill()))

    async with own_nats.bus() as bus, own_nats.bus() as learner, own_nats.bus() as spy, serving(bus, table):
        await spy.nc.subscribe("_INBOX.>", cb=kill_at_a_part)
        count = table.sequences_of(2 * bus.max_payload)
        async with asking(ReplayClient(learner).sample(count)) as sample:
            await eventually(lambda: killed and killed[0].done())
            await own_nats.start()
            table.assert_sampled(await within(sample), count)
            table.assert_sampled(await within(ReplayClient(learner).sample(count)), count)


async def test_an_impatient_client_hears_that_nobody_answers(nats: NatsRun) -> None:
    async with nats.bus(patient=False) as bus:
        for asked in (
            ReplayClient(bus).sample(2),
            ReplayClient(bus).snapshot("a"),
            ReplayClient(bus).update_priorities(np.ones(1, "u8"), np.ones(1)),
        ):
            with pytest.raises(ConnectionFailed, match="replay: nobody there answers"):
                await within(asked)


async def test_priorities_arrive_also_where_they_take_several_messages(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        count = bus.max_payload // 10
        keys = np.arange(count, dtype=np.uint64)
        priorities = np.linspace(0, 1, count, dtype=np.float32)
        await within(ReplayClient(learner).update_priorities(keys, priorities))
        await within(ReplayClient(learner).update_priorities(keys[:0], priorities[:0]))
        assert len(table.updates) == 2
        np.testing.assert_array_equal(np.concatenate([update[0] for update in table.updates]), keys)
        np.testing.assert_array_equal(np.concatenate([update[1] for update in table.updates]), priorities)


async def test_a_snapshot_is_answered_with_what_was_written(nats: NatsRun) -> None:
    table = Table()
    table.free.clear()
    async with (
        nats.bus() as bus,
        nats.bus() as learner,
        serving(bus, table),
        asking(ReplayClient(learner).snapshot("update-7")) as snapshot,
    ):
        assert not (await asyncio.wait({snapshot}, timeout=1.5))[0]
        table.free.set()
        assert await within(snapshot) == {"name": "update-7", "items": 1000, "bytes": 7, "seconds": 0.5}
        assert table.snapshots == ["update-7"]


async def test_a_snapshot_is_written_to_its_end_when_who_asked_went_away(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_serving, "WAITING_SECONDS", 0.01)
    table = Table()
    table.free.clear()
    unheard: list[Exception] = []
    async with nats.bus() as bus, nats.bus() as other, serving(bus, table):
        request = bus.nc.request

        async def noted(*arguments: Any, **options: Any) -> Any:
            try:
                return await request(*arguments, **options)
            except NoRespondersError as error:
                unheard.append(error)
                raise

        monkeypatch.setattr(bus.nc, "request", noted)
        async with nats.bus() as learner, asking(ReplayClient(learner).snapshot("a")):
            await eventually(lambda: table.snapshots)
        await eventually(lambda: unheard)
        table.free.set()
        await eventually(lambda: table.written == ["a"])
        table.assert_sampled(await within(ReplayClient(other).sample(1)), 1)


async def test_a_call_that_was_answered_leaves_nothing_behind(nats: NatsRun) -> None:
    table, calls = Table(), 30

    def kept() -> tuple[int, int]:
        gc.collect()
        return len(learner.nc._subs), sum(type(each) is asyncio.Task for each in gc.get_objects())

    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        client = ReplayClient(learner)
        await within(client.sample(1))
        subscriptions, tasks = kept()
        for _ in range(calls):
            await within(client.sample(1))
        assert kept()[0] == subscriptions
        assert kept()[1] < tasks + calls / 2


async def test_what_can_never_work_is_refused_with_the_reason(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        client = ReplayClient(learner)
        with pytest.raises(Refused, match="replay: a batch of 1001 sequences, the table holds 1,000"):
            await within(client.sample(1001))
        with pytest.raises(Refused, match="replay: a batch of 0 sequences"):
            await within(client.sample(0))
        with pytest.raises(Refused, match=r"snapshot '\.\./x' is not named by"):
            await within(client.snapshot("../x"))
        with pytest.raises(Refused, match=r"\(2,\) priorities of \(3,\) keys"):
            await within(client.update_priorities(np.ones(3, "u8"), np.ones(2)))
        table.failure = RunError("the disk is full")
        with pytest.raises(Refused, match="replay: the disk is full"):
            await within(client.snapshot("a"))
        with pytest.raises(Refused, match="replay: the disk is full"):
            await within(client.update_priorities(np.ones(3, "u8"), np.ones(3)))
        assert not table.snapshots
        assert table.refusals[-2:] == ["the disk is full"] * 2
        table.failure = None
        table.assert_sampled(await within(client.sample(2)), 2)


async def test_what_fails_for_now_is_tried_again(nats: NatsRun) -> None:
    table = Table()
    table.failure = ConnectionFailed("still starting")
    async with (
        nats.bus() as bus,
        nats.bus() as learner,
        serving(bus, table),
        asking(ReplayClient(learner).sample(2)) as sample,
    ):
        await eventually(lambda: table.asked > 1)
        table.failure = None
        table.assert_sampled(await within(sample), 2)


async def test_requests_beyond_what_may_wait_are_told_to_come_again_and_do_once_there_is_room(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_serving, "_MAX_REQUESTS", 2)
    table = Table()
    table.free.clear()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        client = ReplayClient(learner)
        async with asking(client.sample(1)) as one, asking(client.sample(1)) as other:
            await eventually(lambda: table.asked == 2)
            data = encode_priorities(np.ones(1, "u8"), np.ones(1))
            answer = await learner.nc.request(learner.subjects.replay_priorities, data, timeout=10)
            assert answer.data == b'{"failed":"2 requests wait"}'
            async with asking(client.update_priorities(np.ones(1, "u8"), np.ones(1))) as update:
                table.free.set()
                await within(asyncio.gather(one, other, update))
        assert len(table.updates) == 1


async def test_requests_that_were_answered_make_room_for_any_number_of_others(
    nats: NatsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_serving, "_MAX_REQUESTS", 2)
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        await bus.nc.flush()  # the server knows who answers

        async def is_taken(data: bytes) -> bool:
            answer = await learner.nc.request(learner.subjects.replay_priorities, data, timeout=10)
            return not answer.data.startswith(b'{"failed":')  # as it may while the one before is leaving

        for data in (encode_priorities(np.ones(1, "u8"), np.ones(1)), b"garbage") * 4:
            await eventually(partial(is_taken, data))
    assert len(table.updates) == 4


async def test_a_damaged_record_is_sampled_anew_a_few_times(nats: NatsRun) -> None:
    table = Table()
    table.damaged = True
    async with nats.bus() as bus, nats.bus() as learner, serving(bus, table):
        with pytest.raises(ChunkError, match="3 samples in a row are damaged: record"):
            await within(ReplayClient(learner).sample(2))
        assert table.asked == 3


async def test_garbage_is_refused_and_disturbs_nothing(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as other, serving(bus, table):
        client = ReplayClient(other)
        table.assert_sampled(await within(client.sample(1)), 1)
        subjects = other.subjects
        for subject in (subjects.replay_sample, subjects.replay_priorities, subjects.replay_snapshot):
            for garbage in (b"", b"garbage", b"[]", b'{"call":1}', bytes(1000)):
                answer = await other.nc.request(subject, garbage, timeout=10)
                assert answer.data.startswith(b'{"refused":')
                await other.nc.publish(subject, garbage)  # nobody to be told
        table.assert_sampled(await within(client.sample(2)), 2)
        assert not table.updates
        assert not table.snapshots


async def test_garbage_in_place_of_an_answer_is_no_answer(nats: NatsRun) -> None:
    table = Table()
    async with nats.bus() as bus, nats.bus() as learner:

        async def babble(message: Any) -> None:
            await message.respond(b"garbage")

        babbler = await bus.nc.subscribe(learner.subjects.replay_sample, cb=babble)
        async with asking(ReplayClient(learner).sample(2)) as sample:
            assert not (await asyncio.wait({sample}, timeout=1))[0]
            await babbler.unsubscribe()
            async with serving(bus, table):
                table.assert_sampled(await within(sample), 2)


async def test_a_bug_in_a_handler_ends_the_service(nats: NatsRun) -> None:
    table = Table()
    table.failure = KeyError("a bug")

    async def serve() -> None:
        async with nats.bus() as bus, serving(bus, table), asking(ReplayClient(bus).sample(2)):
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await within(serve())
    assert caught.group_contains(KeyError, match="a bug")
