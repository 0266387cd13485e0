"""Replay with a real nats-server: every message accounted for, every sequence as it was cut."""

import asyncio
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from services.replay import feeding
from services.replay.accounts import Accounts
from services.replay.silence import Silence
from services.replay.table import Table
from shared.accounts import write_accounts
from shared.addresses import free_port
from shared.bus.control import request_control
from shared.bus.replay import ReplayClient
from shared.bus.work_queue import queue_state
from shared.errors import ConfigurationError, Refused
from shared.wire.chunks import encode_chunk, slice_rows
from tests.support.chunks import assert_same_chunk
from tests.support.nats import NatsRun
from tests.support.promtool import assert_clean_metrics
from tests.support.replay_runs import (
    CHUNKS_PER_ITEM,
    FREE,
    UNROLL,
    Queue,
    make_chunk,
    replay_config,
    replaying,
    status_of,
)
from tests.support.waiting import eventually


async def test_what_was_published_is_sampled_bit_for_bit_and_accounted_for(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, **FREE)) as replay:
            await queue.fed(9, rows=3)
            await queue.emptied()
            sample = await ReplayClient(bus).sample(90)
            await replay.stopped()
        assert sample.size == 4 * 3  # at chunks 0, 2, 4 and 6, of each row
        for sequence in sample.sequences:
            first, row = sequence[0].header.number, sequence[0].header.first_row
            assert first % 2 == 0
            assert len(sequence) == CHUNKS_PER_ITEM
            for number, chunk in enumerate(sequence, first):
                assert_same_chunk(chunk, slice_rows(queue.chunks[number], row, row + 1))
        seen = {(each[0].header.number, each[0].header.first_row) for each in sample.sequences}
        assert len(seen) == 12
        accounts = await queue.exact_accounts(tmp_path)
        assert (accounts.inserted, accounts.steps) == (9, 9 * 3 * UNROLL)
        assert (accounts.inserted_items, accounts.sampled_items) == (12, 90)
        assert (accounts.redelivered, accounts.rolled_back, sum(accounts.refused.values())) == (0, 0, 0)


async def test_a_gap_is_counted_and_no_sequence_spans_it(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, http_port=free_port(), **FREE)
        async with replaying(config):
            await queue.fed(4, rows=1)
            queue.skip()
            await queue.fed(6, rows=1)
            await queue.emptied()
            sample = await ReplayClient(bus).sample(50)
            metrics = await _metrics(config.http_port)
        assert {each[0].header.number for each in sample.sequences} == {0, 6, 8}
        assert metrics["seedrl_replay_gaps_total"] == 1


async def test_samples_wait_for_enough_sequences_and_say_so(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, min_replay_size=4)):
            await queue.fed(3, rows=2)
            sampling = asyncio.create_task(ReplayClient(bus).sample(2))
            await eventually(lambda: _says(queue, "samples wait: 2 of 4 items"))
            status = await status_of(bus)
            assert status["blocked"] == {"inserts": False, "samples": True}
            assert not sampling.done()
            await queue.fed(2, rows=2)
            assert (await asyncio.wait_for(sampling, 20)).size == 4
            assert (await status_of(bus))["blocked_seconds"]["samples"] > 0


async def test_inserts_wait_for_samples_and_hold_the_queue_up(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus, max_messages=30)
        async with replaying(replay_config(nats, tmp_path)) as replay:
            feeding = asyncio.create_task(queue.fed(60))
            await eventually(lambda: _says(queue, "inserts wait"))
            status = await status_of(bus)
            assert status["blocked"]["inserts"]
            # One item of credit before the first sample, and a buffer of four beside it; in messages of two.
            assert status["inserted_items"] in (4, 5)
            await eventually(lambda: _is_full(queue))
            assert not feeding.done()
            client = ReplayClient(bus)
            while not feeding.done():
                await client.sample(2)
            await feeding
            status = await status_of(bus)
            assert abs(status["sampled_items"] + 1 - status["inserted_items"]) <= 4
            await replay.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.redelivered == 0


async def test_what_cannot_be_inserted_is_refused_with_the_reason(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        chunk = make_chunk(bus.run_id, "other", 0)
        bad_action = np.full_like(chunk.action, 3)
        errors = np.full_like(chunk.td_errors, np.nan) if chunk.td_errors is not None else None
        async with replaying(replay_config(nats, tmp_path, **FREE)) as replay:
            await queue.publish(b"garbage")
            await queue.publish(encode_chunk(replace(chunk, header=replace(chunk.header, run_id="other"))))
            await queue.publish(encode_chunk(replace(chunk, header=replace(chunk.header, network_hash="x"))))
            await queue.publish(encode_chunk(replace(chunk, action=bad_action)))
            await queue.publish(encode_chunk(replace(chunk, td_errors=errors)))
            await queue.publish(encode_chunk(replace(chunk, header=replace(chunk.header, number=2**63 - 1))))
            await queue.fed(3)
            await queue.emptied()
            assert (await ReplayClient(bus).sample(1)).size == 2
            await replay.stopped()
        accounts = await queue.exact_accounts(tmp_path)
        assert accounts.refused == {"undecodable": 1, "spec": 5, "too_large": 0, "lost": 0}
        assert accounts.inserted == 3
        assert accounts.steps == (5 + 3) * chunk.steps


async def test_what_streams_that_ended_have_left_is_freed(
    nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "Silence", lambda now: Silence(now - 1.0, least=0.0))
    drop_silent, freed = Table.drop_silent, []

    def noted(table: Table, since: float) -> int:
        freed.append(since)
        return drop_silent(table, since)

    monkeypatch.setattr(Table, "drop_silent", noted)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, **FREE)):
            await queue.fed(1)
            await eventually(lambda: freed)


async def test_new_priorities_decide_what_is_sampled_and_bad_ones_change_nothing(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, http_port=free_port(), **FREE)
        async with replaying(config):
            await queue.fed(9, rows=3)
            await queue.emptied()
            client = ReplayClient(bus)
            keys = np.unique(np.concatenate([(await client.sample(100)).keys for _ in range(4)]))
            priorities = np.zeros(12)
            priorities[5] = 2.0
            await client.update_priorities(keys, priorities)
            bad = np.array([np.nan, np.inf, -1.0, 1e300])
            await client.update_priorities(keys[:4], bad)
            await client.update_priorities(np.array([77, 2**63], np.uint64), np.ones(2))
            sample = await client.sample(20)
            assert set(sample.keys.tolist()) == {keys[5]}
            assert sample.probabilities.tolist() == [1.0] * 20
            with pytest.raises(Refused, match=r"2 priorities|priorities of"):
                await client.update_priorities(keys[:3], np.ones(2))
            metrics = await _metrics(config.http_port)
        refused = {
            reason: metrics[f'seedrl_replay_refused_priorities_total{{reason="{reason}"}}']
            for reason in ("not_finite", "negative", "too_large", "unknown", "evicted")
        }
        assert refused == {"not_finite": 2, "negative": 1, "too_large": 1, "unknown": 2, "evicted": 0}


async def test_priorities_of_a_sequence_that_made_room_change_nothing(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, replay_capacity=2, http_port=free_port(), **FREE)
        async with replaying(config):
            await queue.fed(5, rows=1)
            await queue.emptied()
            client = ReplayClient(bus)
            keys = np.unique((await client.sample(2)).keys)
            await queue.fed(4, rows=1)
            await queue.emptied()
            before = await client.sample(2)
            await client.update_priorities(keys, np.full(len(keys), 1e6))
            after = {key: p for _ in range(20) for key, p in _probabilities(await client.sample(2))}
            assert set(_probabilities(before)) <= set(after.items())
            metrics = await _metrics(config.http_port)
        assert metrics['seedrl_replay_refused_priorities_total{reason="evicted"}'] == len(keys)
        assert metrics["seedrl_replay_removed_items_total"] == 2


async def test_requests_that_can_never_be_met_are_refused_and_disturb_nobody(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, http_port=free_port())
        async with replaying(config):
            await queue.fed(3, rows=1)
            await queue.emptied()
            client = ReplayClient(bus)
            with pytest.raises(Refused, match="a batch of 101 sequences; replay holds 100 at most"):
                await client.sample(101)
            with pytest.raises(Refused, match="--rate-limiter-error-buffer 4 there can be 7"):
                await client.sample(8)
            for garbage in (b"", b"\x00garbage", b"{}", b'{"call": 3}'):
                for subject in (bus.subjects.replay_sample, bus.subjects.replay_priorities):
                    await bus.nc.request(subject, garbage, timeout=10)
            assert (await client.sample(1)).size == 1
            metrics = await _metrics(config.http_port)
        assert metrics["seedrl_replay_refused_requests_total"] == 2 + 8


async def test_an_error_buffer_too_small_for_a_message_ends_replay_in_words(
    nats: NatsRun, tmp_path: Path
) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, rate_limiter_error_buffer=5)
        async with replaying(config, fails=True) as replay:
            await queue.fed(1, rows=4)
            with pytest.raises(ExceptionGroup) as caught:
                await replay.ended()
        assert caught.group_contains(ConfigurationError, match="5 is too small for messages of 4 rows")


@pytest.mark.parametrize("most", [10, 20_000])
async def test_one_that_can_never_be_sampled_ends_with_the_reason(
    most: int, nats: NatsRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.replay.replay.SHORT_SECONDS", 0.0)
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, min_replay_size=50, replay_max_bytes=most)
        async with replaying(config, fails=True) as replay:
            await queue.fed(20)
            with pytest.raises(ExceptionGroup) as caught:
                await replay.ended()
        words = "sampling cannot begin: samples wait for --min-replay-size 50"
        assert caught.group_contains(ConfigurationError, match=words)
        await queue.exact_accounts(tmp_path)


@pytest.mark.slow
async def test_a_second_replay_of_a_run_is_refused_and_named(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, **FREE)):
            await queue.fed(3)
            await queue.emptied()
            async with replaying(replay_config(nats, tmp_path / "second", **FREE), fails=True) as second:
                with pytest.raises(Refused, match=r"the lease 'replay' .* is held by"):
                    await second.ended()


async def test_settings_that_are_not_the_runs_are_refused(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        await Queue.created(bus)
        for settings, words in (({"lstm_size": 9}, "lstm_size is 9"), ({"agent": "vtrace"}, "not vtrace")):
            async with replaying(replay_config(nats, tmp_path, **settings), fails=True) as replay:
                with pytest.raises(ConfigurationError, match=words):
                    await replay.ended()


async def test_counters_go_on_where_they_were_before_anything_is_restored(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = replay_config(nats, tmp_path, http_port=free_port())
    (tmp_path / "replay").mkdir()
    write_accounts(tmp_path / "replay", Accounts(steps=77).to_json())
    async with replaying(config) as replay:

        async def answers() -> object:
            try:
                return await _metrics(config.http_port)
            except aiohttp.ClientError:
                return None

        metrics = await eventually(answers)
        assert metrics["seedrl_replay_steps_total"] == 77
        await replay.stopped()


async def test_it_says_what_it_awaits_and_can_be_stopped_before_anything_comes(
    nats: NatsRun, tmp_path: Path
) -> None:
    config = replay_config(nats, tmp_path, http_port=free_port())
    async with replaying(config) as replay, aiohttp.ClientSession() as session:

        async def reasons() -> object:
            try:
                async with session.get(f"http://127.0.0.1:{config.http_port}/readyz") as response:
                    return (await response.json())["reasons"]
            except aiohttp.ClientError:
                return None

        async def awaits_the_spec() -> bool:
            return await reasons() == ["the run's spec, which the first actor's environment decides"]

        await eventually(awaits_the_spec)
        await replay.stopped()


async def test_metrics_are_as_prometheus_likes_them(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        config = replay_config(nats, tmp_path, http_port=free_port(), **FREE)
        async with replaying(config):
            await queue.fed(5)
            await queue.emptied()
            await ReplayClient(bus).sample(10)
            text = await _exposition(config.http_port)
            metrics = await _metrics(config.http_port)
        assert_clean_metrics(text)
        assert metrics["seedrl_replay_items"] == 4
        assert metrics["seedrl_replay_samples_per_insert"] == 2.5
        assert metrics["seedrl_replay_sampled_item_uses_count"] == 10
        assert metrics['seedrl_replay_chunks_total{outcome="inserted"}'] == 5


async def test_control_writes_a_snapshot_and_stops_it(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus:
        queue = await Queue.created(bus)
        async with replaying(replay_config(nats, tmp_path, **FREE)) as replay:
            await queue.fed(5)
            await queue.emptied()
            (reply,) = await request_control(bus, "checkpoint", timeout=20)
            assert reply["done"] == "wrote a snapshot of 4 sequences"
            await request_control(bus, "stop", timeout=20)
            await replay.ended()
        assert [path.name[-3:] for path in sorted((tmp_path / "replay").glob("snapshot-*"))] == ["rol", "end"]


def _probabilities(sample: object) -> list[tuple[int, float]]:
    return list(zip(sample.keys.tolist(), sample.probabilities.tolist(), strict=True))  # type: ignore[attr-defined]


async def _is_full(queue: Queue) -> bool:
    return (await queue_state(queue.bus)).messages == 30


async def _says(queue: Queue, words: str) -> bool:
    return words in ((await status_of(queue.bus))["limiter"] or "")


async def _exposition(port: int) -> str:
    url = f"http://127.0.0.1:{port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


async def _metrics(port: int) -> dict[str, float]:
    lines = (await _exposition(port)).splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}
