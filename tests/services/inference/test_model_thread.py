import asyncio
import threading

import pytest

from services.inference.model_thread import ModelThread


def nothing() -> None:
    """A beat that nobody hears."""


async def test_jobs_run_in_order_in_one_thread() -> None:
    order: list[int] = []
    async with ModelThread(beat=nothing) as thread:

        def job(number: int) -> str:
            order.append(number)
            return threading.current_thread().name

        names = await asyncio.gather(
            *(thread.call(lambda number=number: job(number)) for number in range(20))
        )  # type: ignore[misc]
    assert order == list(range(20))
    assert set(names) == {"model"}


@pytest.mark.parametrize("is_quick", [False, True])
async def test_an_error_is_the_callers(is_quick: bool) -> None:
    async with ModelThread(beat=nothing) as thread:
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda: 1 // 0, is_quick=is_quick)
        with pytest.raises(RuntimeError, match="a job raised StopIteration"):  # which no future takes
            await thread.call(lambda: next(iter(())), is_quick=is_quick)
        assert await thread.call(lambda: 1, is_quick=is_quick) == 1
        assert thread.call(lambda: None, is_quick=True).done()


async def test_a_cancelled_job_is_not_begun_and_one_that_runs_is_waited_for() -> None:
    running, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def long() -> None:
        running.set()
        go_on.wait(5)
        done.append("long")

    async with ModelThread(beat=nothing) as thread:
        first = thread.call(long)
        second = thread.call(lambda: done.append("cancelled"))
        await asyncio.get_running_loop().run_in_executor(None, running.wait)
        first.cancel()
        second.cancel()
        go_on.set()
        await thread.call(lambda: None)
        assert thread.call(lambda: None, is_quick=True).done(), "those count as done, too"
    assert done == ["long"]


async def test_it_beats_also_while_there_is_nothing_to_do() -> None:
    beats = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()
    async with ModelThread(beat=lambda: loop.call_soon_threadsafe(beats.put_nowait, None)):
        async with asyncio.timeout(10):
            for _ in range(3):
                await beats.get()


async def test_the_thread_has_ended_on_leaving_however_long_its_last_beat_takes() -> None:
    ended = []

    def beat() -> None:
        threading.Event().wait(0.05)
        ended.append(threading.current_thread())

    async with ModelThread(beat=beat) as thread:
        await thread.call(lambda: None)
    assert not any(each.is_alive() for each in ended)
    assert "model" not in [each.name for each in threading.enumerate()]


async def test_a_quick_job_is_done_here_unless_the_thread_has_something_to_do() -> None:
    go_on = threading.Event()

    def name() -> str:
        return threading.current_thread().name

    async with ModelThread(beat=nothing) as thread:
        here = thread.call(name, is_quick=True)
        assert here.done()
        assert await here == threading.current_thread().name
        long = thread.call(lambda: go_on.wait(5))
        behind = thread.call(name, is_quick=True)
        assert not behind.done()
        go_on.set()
        assert await long
        assert await behind == "model"
        assert thread.call(name, is_quick=True).done()
