import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from services.replay.gate import Gate, Waits
from services.replay.table import Inserted
from shared.errors import ConfigurationError, Refused
from tests.support.replay_shelves import Messages, shelf_of

TURNS = 50  # of the event loop: far more than a gate takes for whatever can go on


async def come_to_rest() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


@asynccontextmanager
async def started(*calls: Coroutine[Any, Any, Any]) -> AsyncIterator[list["asyncio.Task[Any]"]]:
    """Tasks that came to rest, the first one first; cancelled at the end."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        await come_to_rest()
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def insert_for_ever(gate: Gate, *, rows: int = 2, random_turns: random.Random | None = None) -> None:
    messages = Messages(rows=rows)
    while True:
        await gate.insert(messages.next())
        await idle(random_turns)


async def sample_for_ever(gate: Gate, n: int, *, random_turns: random.Random | None = None) -> None:
    while True:
        await gate.sample(n)
        await idle(random_turns)


async def idle(random_turns: random.Random | None) -> None:
    for _ in range(random_turns.choice((1, 1, 1, 3, 20)) if random_turns else 1):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("ratio", "rows", "batch_size"), [(0.75, 3, 8), (6.0, 2, 4), (0.1, 16, 2)])
async def test_over_a_long_random_run_samples_per_insert_stay_within_the_buffer(
    ratio: float, rows: int, batch_size: int
) -> None:
    shelf = shelf_of(replay_ratio=ratio, batch_size=batch_size, min_replay_size=20)
    gate, limiter = Gate(shelf), shelf.limiter
    turns = random.Random(1)
    surplus = 0.0
    async with started(
        insert_for_ever(gate, rows=rows, random_turns=turns),
        sample_for_ever(gate, batch_size, random_turns=turns),
    ):
        for _ in range(20_000):
            await asyncio.sleep(0)
            if limiter.samples == 0:  # of the message that completed the minimum
                surplus = max(surplus, limiter.balance - limiter.error_buffer)
            assert limiter.balance <= limiter.error_buffer + surplus
            assert limiter.samples == 0 or limiter.balance >= -limiter.error_buffer
    assert limiter.samples > 10_000 * min(ratio, 0.3)
    assert limiter.samples / limiter.inserts == pytest.approx(ratio, rel=0.1)


async def test_inserts_wait_when_samples_stall_and_the_shelf_names_them() -> None:
    shelf = shelf_of(replay_ratio=1.0, batch_size=8)
    gate = Gate(shelf)
    async with started(insert_for_ever(gate)):
        assert (gate.inserts.is_blocked, gate.samples.is_blocked) == (True, False)
        assert shelf.words() == "inserts wait: 1 more items to be sampled"
        before = shelf.table.inserts
        await gate.sample(1)
        await come_to_rest()
        assert gate.inserts.is_blocked
        assert shelf.table.inserts == before + 2
        await gate.sample(8)
        await come_to_rest()
        assert shelf.table.inserts == before + 10


async def test_samples_wait_when_inserts_stall_and_the_shelf_names_them() -> None:
    shelf = shelf_of(replay_ratio=1.0, batch_size=8, min_replay_size=4)
    gate, messages = Gate(shelf), Messages()
    await gate.insert(messages.next())
    async with started(sample_for_ever(gate, 8)):
        assert (gate.inserts.is_blocked, gate.samples.is_blocked) == (False, True)
        assert shelf.words() == "samples wait: 2 of 4 items"
        await gate.insert(messages.next())
        await come_to_rest()
        assert (gate.inserts.is_blocked, gate.samples.is_blocked) == (False, True)
        assert shelf.table.samples == 16
        assert shelf.words() == "samples wait: 8 more items to be inserted"
        for _ in range(4):
            await gate.insert(messages.next())
        await come_to_rest()
        assert shelf.table.samples == 24


@pytest.mark.parametrize("stalled", ["inserts", "samples"])
async def test_after_a_restart_with_the_table_full_both_sides_go_on(stalled: str) -> None:
    settings = {"replay_capacity": 10, "min_replay_size": 10, "replay_ratio": 2.0, "batch_size": 8}
    gate = Gate(shelf_of(**settings))
    async with started(insert_for_ever(gate)):
        pass  # until inserts wait
    if stalled == "samples":
        async with started(sample_for_ever(gate, 8)):
            pass
    assert gate.shelf.table.size == 10
    state = gate.shelf.state()
    again = Gate(shelf_of(state, **settings))
    assert again.shelf.limiter.balance == gate.shelf.limiter.balance
    assert again.shelf.words() == gate.shelf.words() != "free"
    inserts, samples = again.shelf.table.inserts, again.shelf.table.samples
    async with started(insert_for_ever(again), sample_for_ever(again, 8)):
        await come_to_rest()
        assert again.shelf.table.inserts > inserts + 50
        assert again.shelf.table.samples > samples + 100
        assert abs(again.shelf.limiter.balance) <= again.shelf.limiter.error_buffer


async def test_who_waits_longest_is_served_first_however_little_the_next_one_asks_for() -> None:
    gate, messages = Gate(shelf_of(replay_ratio=1.0, batch_size=8)), Messages()
    await gate.insert(messages.next())
    await gate.sample(8)
    done: list[int] = []

    async def sample(n: int) -> None:
        await gate.sample(n)
        done.append(n)

    async with started(sample(16), sample(1)):
        for _ in range(4):
            assert done == []
            assert gate.shelf.may_sample(1)
            await gate.insert(messages.next())
            await come_to_rest()
        assert done == [16, 1]


async def test_who_gives_up_waiting_leaves_the_turn_to_the_next() -> None:
    gate = Gate(shelf_of(replay_ratio=1.0))
    async with started(gate.sample(2), gate.sample(1)) as (first, second):
        assert gate.samples.is_blocked
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        await gate.insert(Messages().next())
        await come_to_rest()
        assert len(second.result().keys) == 1
    assert not gate.samples.is_blocked
    assert gate.shelf.table.samples == 1


async def test_what_can_never_be_is_refused_at_once_and_holds_nobody_up() -> None:
    gate = Gate(shelf_of(replay_max_bytes=150, rate_limiter_error_buffer=10))
    with pytest.raises(Refused, match="a batch of 101 sequences; replay holds 100 at most"):
        await gate.sample(101)
    with pytest.raises(Refused, match=r"a batch of 100 sequences; with --batch-size 2 of replay.* can be 19"):
        await gate.sample(100)
    with pytest.raises(ConfigurationError, match="too small for messages of 6 rows"):
        await gate.insert(Messages(rows=6).next())
    too_large = Messages(rows=5).next()
    with pytest.raises(ValueError, match="bytes of rows are more than"):
        await gate.insert(too_large)
    inserted: Inserted = await gate.insert(Messages("another", rows=2).next())
    assert inserted.items == 2
    assert len((await gate.sample(2)).keys) == 2
    assert gate.inserts.seconds == gate.samples.seconds == 0


def test_overlapping_waits_are_timed_once_and_those_that_go_on_count() -> None:
    now = 100.0
    waits = Waits(lambda: now)
    assert (waits.is_blocked, waits.seconds, waits.ended) == (False, 0, 100)
    with waits.waiting():
        now = 103.0
        assert (waits.is_blocked, waits.seconds) == (True, 3)
        with waits.waiting():
            now = 104.0
        assert (waits.is_blocked, waits.seconds) == (True, 4)
        now = 107.0
    assert (waits.is_blocked, waits.seconds, waits.ended) == (False, 7, 107)
    now = 200.0
    with suppress(KeyError), waits.waiting():
        now = 201.0
        raise KeyError
    assert (waits.is_blocked, waits.seconds, waits.ended) == (False, 8, 201)


async def test_a_sample_that_larger_messages_make_unreachable_is_refused_while_it_waits() -> None:
    gate = Gate(shelf_of(replay_ratio=0.75, batch_size=32, min_replay_size=20, replay_capacity=1000))
    async with started(gate.sample(125), insert_for_ever(gate, rows=32)) as (sampling, _):
        with pytest.raises(Refused, match=r"a batch of 125 sequences; .* there can be 104"):
            await sampling
