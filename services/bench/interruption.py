"""Ctrl-C while a benchmark runs."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from shared.runtime import run_command

T = TypeVar("T")


def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end. SIGINT and SIGTERM cancel it; what it raises then is KeyboardInterrupt.

    The signals are the event loop's: as an exception out of nowhere, one that comes while a process is being
    started would be swallowed.
    """
    try:
        return run_command(_cancelled_by_signals(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:  # where Ctrl-C came before it began, it never will
        work.close()


async def _cancelled_by_signals(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task
