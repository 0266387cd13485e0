import asyncio
import threading

import pytest

from services.actor.threads import StepThreads
from tests.support.waiting import eventually


async def test_a_function_runs_in_a_thread_and_its_result_comes_back() -> None:
    with StepThreads(1) as threads:
        name = await threads.run(lambda: threading.current_thread().name)
    assert name == "step-0"


async def test_an_error_comes_back_too() -> None:
    with StepThreads(1) as threads:
        for error in (ValueError, SystemExit):

            def fail(error: type[BaseException] = error) -> None:
                raise error("no")

            with pytest.raises(error):
                await threads.run(fail)
        assert await threads.run(lambda: 1) == 1


async def test_an_error_that_no_future_takes_comes_back_as_one_that_it_does() -> None:
    with StepThreads(1) as threads:
        with pytest.raises(RuntimeError, match="a job raised StopIteration"):
            await threads.run(lambda: next(iter(())))
        assert await threads.run(lambda: 1) == 1


async def test_a_job_that_says_it_was_cancelled_has_failed() -> None:
    def cancelled() -> None:
        raise asyncio.CancelledError

    with StepThreads(1) as threads:
        with pytest.raises(RuntimeError, match="a job raised CancelledError"):
            await threads.run(cancelled)
        assert await threads.run(lambda: 1) == 1


async def test_one_thread_serves_in_the_order_of_asking() -> None:
    order: list[int] = []
    with StepThreads(1) as threads:
        await asyncio.gather(*(threads.run(lambda n=n: order.append(n)) for n in range(20)))  # type: ignore[misc]
    assert order == list(range(20))


async def test_several_threads_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=5)
    with StepThreads(2) as threads:
        await asyncio.gather(*(threads.run(meeting.wait, group=group) for group in (4, 5)))


async def test_a_group_has_always_the_same_thread() -> None:
    with StepThreads(2) as threads:
        places = [
            await threads.run(lambda: threading.current_thread().name, group=group)
            for group in (0, 1, 2, 0, 1, 2, 2, 2)
        ]
    assert places == ["step-0", "step-1", "step-0", "step-0", "step-1", "step-0", "step-0", "step-0"]


async def test_who_is_cancelled_does_not_wait_and_what_has_not_begun_never_runs() -> None:
    go, ran = threading.Event(), threading.Event()
    with StepThreads(1) as threads:
        running = asyncio.create_task(threads.run(go.wait))
        queued = asyncio.create_task(threads.run(ran.set))
        await eventually(lambda: threads.longest_silence() > 0)
        running.cancel()
        queued.cancel()
        await asyncio.wait([running, queued], timeout=5)
        assert running.cancelled()
        assert queued.cancelled()
        assert not go.is_set()
        go.set()
        await threads.run(lambda: None)
    assert not ran.is_set()


async def test_a_job_beyond_its_limit_is_overdue_until_it_ends() -> None:
    go = threading.Event()
    with StepThreads(1) as threads:
        unlimited = asyncio.create_task(threads.run(go.wait))
        await eventually(lambda: threads.longest_silence() > 0.05)
        assert not threads.is_overdue()
        go.set()
        await unlimited
        go.clear()
        limited = asyncio.create_task(threads.run(go.wait, limit_seconds=0.05))
        await eventually(threads.is_overdue)
        go.set()
        await limited
        assert not threads.is_overdue()
        assert threads.longest_silence() == 0


async def test_a_job_that_gets_on_is_not_silent_and_has_its_whole_limit_again() -> None:
    step, now = threading.Semaphore(0), 1000.0

    def work() -> None:
        step.acquire()
        threads.gets_on()
        step.acquire()

    with StepThreads(1, clock=lambda: now) as threads:
        job = asyncio.create_task(threads.run(work, limit_seconds=1.5))
        await eventually(lambda: threads._running)
        now += 1.0
        assert threads.longest_silence() == 1.0
        assert not threads.is_overdue()
        step.release()
        await eventually(lambda: threads.longest_silence() == 0)
        now += 1.0
        assert threads.longest_silence() == 1.0
        assert not threads.is_overdue()
        now += 1.0
        assert threads.is_overdue()
        step.release()
        await job


async def test_time_in_which_the_process_did_not_run_is_not_the_jobs() -> None:
    go, now = threading.Event(), 1000.0
    with StepThreads(1, clock=lambda: now) as threads:
        job = asyncio.create_task(threads.run(go.wait, limit_seconds=3.0))
        await eventually(lambda: threads._running)
        now += 0.5
        assert not threads.is_overdue()
        now += 80.0  # stopped, and continued: counts as a second
        assert not threads.is_overdue()
        assert not threads.is_overdue()
        now += 1.0
        assert not threads.is_overdue()
        now += 0.6
        assert threads.is_overdue()
        go.set()
        await job


async def test_threads_do_not_keep_the_process_and_end_when_left() -> None:
    with StepThreads(2) as threads:
        await threads.run(lambda: None)
        assert all(thread.daemon for thread in threads._threads)
    for thread in threads._threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


async def test_a_result_that_nobody_waits_for_any_more_does_no_harm() -> None:
    go = threading.Event()
    with StepThreads(1) as threads:

        def of_another_loop() -> None:
            async def give_up() -> None:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await threads.run(go.wait)

            asyncio.run(give_up())

        await asyncio.to_thread(of_another_loop)
        go.set()
        assert await threads.run(lambda: 5) == 5
