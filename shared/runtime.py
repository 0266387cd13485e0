"""How a service lives: its tasks, its signals, its end and its exit status; knows no particular service."""

import asyncio
import faulthandler
import os
import queue
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn, TypeVar

import uvloop

from shared.errors import SeedrlError
from shared.memory import keep_freed_memory
from shared.telemetry import get_logger

T = TypeVar("T")

_FAILED = 1  # exit status of an unexpected error, and of an end that could not be waited for
_CONSEQUENCES = (asyncio.CancelledError, GeneratorExit)  # of another error, never the reason itself

log = get_logger(__name__)


class Stopped(Exception):
    """Ends a TaskGroup from within; never leaves `run_until_stopped`."""


async def run_until_stopped(*tasks: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Runs `tasks` until all have returned, one fails, or `stop` is set; the last two cancel the rest.

    Without tasks it waits for `stop`. Raises an ExceptionGroup of what the tasks raised.
    """

    async def raise_when_stopped() -> None:
        await stop.wait()
        raise Stopped

    try:
        async with asyncio.TaskGroup() as group:
            started = [group.create_task(task) for task in tasks]
            waiting = group.create_task(raise_when_stopped())
            if started:
                await asyncio.wait(started)
                waiting.cancel()
    except* Stopped:
        pass


async def in_thread(function: Callable[[], T], executor: Executor | None = None) -> T:
    """The result of `function`, run in a thread of `executor` (default: the event loop's own).

    When cancelled it waits until the function has returned, so that nothing runs on behind the caller's back;
    an error of the function then comes first, or else CancelledError.
    """
    running = asyncio.get_running_loop().run_in_executor(executor, function)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue
        if not running.cancelled() and (error := running.exception()):
            raise error from None
        raise


def outcome(job: Callable[[], T], future: "asyncio.Future[T]") -> Callable[[], None]:
    """Does `job` in the thread that calls this; what it returns tells `future`, and is for the event loop."""
    try:
        result = job()
    except (StopIteration, asyncio.CancelledError) as error:  # no future takes it, or not for what it is
        return partial(_fail, future, RuntimeError(f"a job raised {error!r}"))
    except BaseException as error:  # it belongs to whoever asked
        return partial(_fail, future, error)
    return partial(_resolve, future, result)


def _resolve(future: "asyncio.Future[T]", result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)


def stop_signals() -> tuple[signal.Signals, ...]:
    """What tells a process to end: SIGTERM, SIGINT, and SIGHUP, unless nohup had that ignored."""
    ignores_hangups = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignores_hangups else (signal.SIGHUP,)))


def run_service(main: Callable[[asyncio.Event], Awaitable[None]], *, grace_seconds: float) -> int:
    """Runs `main(stop)` on uvloop to its end and returns the process's exit status.

    `stop_signals` set `stop`. If a second one comes, or `main` has not returned `grace_seconds` after the
    first, the process exits at once with status 1. A SeedrlError, also within an ExceptionGroup, becomes one
    line on stderr and its own exit status; any other error is logged with its traceback and gives 1. Of
    several errors the first decides. To be called in the main thread.
    """
    keep_freed_memory()
    stop = asyncio.Event()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())  # until there is who answers them
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    loop = runner.get_loop()

    def set_stop() -> None:
        with suppress(RuntimeError):  # the loop is closed: everything has ended
            loop.call_soon_threadsafe(stop.set)

    async def run() -> None:
        await main(stop)

    faulthandler.enable()
    try:
        with _signals(set_stop, grace_seconds):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            with runner:  # closing it waits for its threads
                runner.run(run())
    except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
        return _reported(error)
    return 0


def run_command(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on uvloop, for a command that ends; in the main thread.

    What would stop a service cancels `main`, unless that says otherwise, and raises KeyboardInterrupt. The
    signals are the event loop's: as an exception out of nowhere, one that comes while a process is being
    started would be swallowed. One that comes while the loop is made waits: as KeyboardInterrupt raised there
    it would leave a loop that complains.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())

    async def run() -> T:
        task = asyncio.create_task(main)
        for number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return await task

    running = run()
    try:
        return uvloop.run(running)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:  # where they did not begin, they never will
        running.close()
        main.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _signals(on_first: Callable[[], object], grace_seconds: float) -> Iterator[None]:
    """Within, the first signal calls `on_first`; a second, or `grace_seconds` after it, exits hard.

    A thread does the latter, since the event loop may be what does not come to an end. The handlers only put
    into a queue and wake the loop, which is safe wherever they interrupt.
    """
    seen: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child, which inherits this: its parent ends it, by SIGTERM
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        seen.put(signal.Signals(number).name)
        on_first()

    guard = threading.Thread(target=_exit_hard, args=(seen, grace_seconds), name="signals", daemon=True)
    guard.start()
    before = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        seen.put(None)
        guard.join()


def _exit_hard(seen: "queue.SimpleQueue[str | None]", grace_seconds: float) -> None:
    """Exits the process on the second signal or `grace_seconds` after the first; None ends the watch."""
    # Taken by this thread, a signal would not interrupt the main thread, where Python runs the handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    first = seen.get()
    if first is None:
        return
    try:
        second = seen.get(timeout=grace_seconds)
    except queue.Empty:
        faulthandler.dump_traceback(all_threads=True)
        _last_words(f"still not ended {grace_seconds:g} s after {first}; gave up")
    if second is not None:
        _last_words(f"{second} after {first}; ended at once")


def _reported(error: BaseException) -> int:
    """Says on stderr and in the log what ended the service; returns the exit status."""
    errors = [each for each in _leaves(error) if not isinstance(each, _CONSEQUENCES)] or [error]
    for unexpected in errors:
        if not isinstance(unexpected, SeedrlError):
            log.error("unexpected error", exc_info=unexpected)
    first = errors[0]
    if isinstance(first, SeedrlError):
        log.debug("ended by", exc_info=first)
        sys.stderr.write(_line(str(first)))
        return first.exit_status
    sys.stderr.write(_line(f"unexpected error, see the traceback in the log: {first!r}"))
    return _FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, and in the groups within, in the order in which they were raised."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _line(text: str) -> str:
    return f"seedrl: {' '.join(text.split())}\n"


def _last_words(text: str) -> NoReturn:
    """Exits with one line, not through buffers and locks that a stuck thread may hold."""
    os.write(2, _line(text).encode(errors="replace"))
    os._exit(_FAILED)
