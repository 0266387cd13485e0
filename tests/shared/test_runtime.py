import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.errors import ConnectionFailed
from shared.runtime import in_thread, run_until_stopped

DEADLINE = 20.0

# Run until stopped


async def test_stop_cancels_the_tasks_and_is_no_error() -> None:
    stop, started, ended = asyncio.Event(), asyncio.Event(), []

    async def serve() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.append("serve")

    async def ask_to_stop() -> None:
        await started.wait()
        stop.set()

    await asyncio.wait_for(run_until_stopped(serve(), ask_to_stop(), stop=stop), DEADLINE)
    assert ended == ["serve"]


async def test_a_stop_that_came_before_starts_nothing() -> None:
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(run_until_stopped(asyncio.Event().wait(), stop=stop), DEADLINE)  # type: ignore[arg-type]


async def test_a_failure_cancels_the_rest_and_is_raised() -> None:
    cancelled = []

    async def serve() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append("serve")

    async def fail() -> None:
        raise ConnectionFailed("gone")

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(run_until_stopped(serve(), fail(), stop=asyncio.Event()), DEADLINE)
    assert [type(error) for error in caught.value.exceptions] == [ConnectionFailed]
    assert cancelled == ["serve"]


async def test_an_error_while_stopping_is_raised() -> None:
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            stop.set()
            await asyncio.Event().wait()
        finally:
            raise ConnectionFailed("could not save")

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(run_until_stopped(serve(), stop=stop), DEADLINE)
    assert caught.group_contains(ConnectionFailed, match="could not save")


async def test_it_returns_when_all_tasks_have() -> None:
    done = []

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        done.append(name)

    await asyncio.wait_for(run_until_stopped(work("a"), work("b"), stop=asyncio.Event()), DEADLINE)
    assert done == ["a", "b"]


async def test_without_tasks_it_waits_for_stop() -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(run_until_stopped(stop=stop))
    await asyncio.sleep(0.01)  # time in which it could wrongly return
    assert not waiting.done()
    stop.set()
    await asyncio.wait_for(waiting, DEADLINE)


# In a thread


class Work:
    """A function that runs in a thread until it is released."""

    def __init__(self, result: Callable[[], str]) -> None:
        self.started, self.release, self.finished = threading.Event(), threading.Event(), False
        self._result = result

    def __call__(self) -> str:
        self.started.set()
        assert self.release.wait(DEADLINE)
        self.finished = True
        return self._result()

    async def until_started(self) -> None:
        assert await asyncio.to_thread(self.started.wait, DEADLINE)


def failing() -> str:
    raise ConnectionFailed("in the thread")


async def test_the_result_of_the_thread_is_returned() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        assert (await in_thread(lambda: threading.current_thread().name, executor)).startswith("mine")
    assert await in_thread(lambda: 3) == 3


async def test_an_error_of_the_thread_is_raised() -> None:
    with pytest.raises(ConnectionFailed):
        await in_thread(failing)


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_cancelled_it_waits_until_the_thread_is_done(cancellations: int) -> None:
    work = Work(lambda: "result")
    task = asyncio.create_task(in_thread(work))
    await work.until_started()
    for _ in range(cancellations):
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not task.done()
    work.release.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, DEADLINE)
    assert work.finished


async def test_cancelled_it_still_raises_the_error_of_the_thread() -> None:
    work = Work(failing)
    task = asyncio.create_task(in_thread(work))
    await work.until_started()
    task.cancel()
    await asyncio.sleep(0)
    work.release.set()
    with pytest.raises(ConnectionFailed):
        await asyncio.wait_for(task, DEADLINE)
