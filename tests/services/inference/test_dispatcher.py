import asyncio
import gc
import weakref

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.inference.batcher import Batcher
from services.inference.dispatcher import Answer, Dispatcher
from services.inference.metrics import InferenceMetrics
from services.inference.model import Answers, PackedBatch
from services.inference.staging import StagingPool
from tests.support.asker import Asker
from tests.support.counting_group import ENVIRONMENT, LEAF
from tests.support.waiting import eventually


class Bench:
    """A dispatcher before a device that finishes when it is told to, and answers with what it was asked."""

    in_place = True  # whether observations are left where they are

    def __init__(self, *, max_batch_delay: float = 3600.0) -> None:
        self.given: list[tuple[PackedBatch, asyncio.Future[Answers]]] = []
        self.metrics = InferenceMetrics(CollectorRegistry())
        self.dispatcher = Dispatcher(
            run=self._run,
            pool=StagingPool(ENVIRONMENT, rows=4, pinned=False, in_place=self.in_place),
            batcher=Batcher(max_batch_size=4, max_batch_delay=max_batch_delay),
            metrics=self.metrics,
        )

    def ask(self, number: int, rows: int = 1) -> "asyncio.Future[Answer]":
        asker = Asker(number, rows)
        return self.dispatcher.ask(asker, asker.step())

    def finish(self) -> None:
        """The device is done with the oldest batch it was given."""
        batch, future = self.given.pop(0)
        asked = batch.staging.observation(batch.rows)[LEAF][:, 0].numpy().astype(np.int64)
        future.set_result(Answers(asked, np.zeros((batch.rows, 2)), None, 1, 1, 0.1))

    def _run(self, batch: PackedBatch) -> "asyncio.Future[Answers]":
        future: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()
        self.given.append((batch, future))
        return future

    @property
    def running_rows(self) -> list[int]:
        return [batch.rows for batch, _ in self.given]


@pytest.fixture(autouse=True, params=[True, False], ids=["in place", "copied"])
def _where_observations_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "in_place", request.param)


async def test_requests_gather_while_the_device_is_busy() -> None:
    bench = Bench()
    first = bench.ask(1)
    others = [bench.ask(2), bench.ask(3, rows=2)]
    assert bench.running_rows == [1]
    bench.finish()
    assert (await first).action.tolist() == [1]
    await eventually(lambda: bench.running_rows == [3])
    bench.finish()
    assert [(await other).action.tolist() for other in others] == [[2], [3, 3]]


async def test_a_full_batch_goes_behind_the_one_that_runs_but_no_further() -> None:
    bench = Bench()
    for number in range(1, 11):
        bench.ask(number)
    assert bench.running_rows == [1, 4]
    bench.finish()
    await eventually(lambda: bench.running_rows == [4, 4])
    bench.finish()
    await asyncio.sleep(0)
    assert bench.running_rows == [4], "one request is left, and the device is busy"
    bench.finish()
    await eventually(lambda: bench.running_rows == [1])


async def test_a_batch_leaves_after_the_delay_though_somebody_is_awaited() -> None:
    bench = Bench(max_batch_delay=0.05)
    bench.dispatcher.expect(Asker(9, 1))
    loop = asyncio.get_running_loop()
    started = loop.time()
    bench.ask(1)
    assert bench.running_rows == []
    await eventually(lambda: bench.running_rows == [1])
    assert loop.time() - started >= 0.045


async def test_nothing_leaves_while_it_is_blocked_for_any_reason() -> None:
    bench = Bench()
    bench.dispatcher.block("weights")
    bench.dispatcher.block("pause")
    future = bench.ask(1)
    bench.dispatcher.unblock("weights")
    assert bench.running_rows == []
    bench.dispatcher.unblock("pause")
    assert bench.running_rows == [1]
    bench.finish()
    await future


async def test_who_was_answered_is_awaited_before_the_next_batch_leaves() -> None:
    bench = Bench()
    fast = Asker(1, 1)

    async def go_on() -> None:
        await bench.dispatcher.ask(fast, fast.step())
        bench.dispatcher.expect(fast)

    going = asyncio.create_task(go_on())
    await asyncio.sleep(0)
    bench.ask(2)
    bench.finish()
    await going
    await asyncio.sleep(0.01)
    assert bench.running_rows == [], "the fast one owes a request"
    bench.dispatcher.ask(fast, fast.step())
    assert bench.running_rows == [2]


async def test_an_answer_to_somebody_who_left_is_dropped() -> None:
    bench = Bench()
    gone, stays = Asker(1, 2), Asker(2, 2)
    bench.dispatcher.block("pause")
    bench.dispatcher.ask(gone, gone.step())
    future = bench.dispatcher.ask(stays, stays.step())
    bench.dispatcher.unblock("pause")
    bench.dispatcher.forget(gone)
    bench.finish()
    assert (await future).action.tolist() == [2, 2]


async def test_who_left_before_the_batch_did_is_forgotten() -> None:
    bench = Bench()
    bench.dispatcher.block("pause")
    gone = Asker(1, 2)
    bench.dispatcher.expect(gone)
    bench.dispatcher.ask(gone, gone.step())
    bench.dispatcher.forget(gone)
    trace = weakref.ref(gone)
    del gone
    gc.collect()
    assert trace() is None
    bench.dispatcher.unblock("pause")
    assert bench.running_rows == []


async def test_what_the_device_raises_is_told() -> None:
    bench = Bench()
    bench.ask(1)
    bench.given.pop(0)[1].set_exception(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        await asyncio.wait_for(bench.dispatcher.failed(), 1)


async def test_a_group_larger_than_the_staging_area_gets_a_larger_one() -> None:
    bench = Bench()
    future = bench.ask(3, rows=9)
    assert bench.running_rows == [9]
    bench.finish()
    assert (await future).action.tolist() == [3] * 9
    again = bench.ask(4, rows=2)
    bench.finish()
    assert (await again).action.tolist() == [4, 4]
