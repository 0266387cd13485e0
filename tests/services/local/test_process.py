"""One child process: what it is given, what it says, how it ends."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from services.local.process import ChildProcess

AUTOGROUP = Path("/proc/self/autogroup")


def child(tmp_path: Path, code: str, **environment: str) -> ChildProcess:
    command = [sys.executable, "-c", code]
    return ChildProcess("child", lambda: command, environment=environment, log=tmp_path / "child.log")


async def test_settings_of_the_persons_environment_do_not_reach_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_SEED", "1")
    code = "import os; print('seedrl: seed', os.environ.get('SEEDRL_SEED'), os.environ['SEEDRL_X'])"
    process = child(tmp_path, code, SEEDRL_X="2")
    await process.start()
    assert await process.wait() == 0
    assert process.last_words() == "seed None 2"


async def test_last_words_are_what_this_start_said_to_a_person(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    for code, words in (
        ("print('seedrl: first'); print('seedrl: last'); print('{}')", "last"),
        ("print('noise')", ""),
        ("", ""),
        ("import os; print('seedrl: stops', flush=True); os.kill(os.getpid(), 9)", ""),
    ):
        process = child(tmp_path, code)
        assert process.last_words() == ""
        await process.start()
        await process.wait()
        assert process.last_words() == words
    assert log.read_text().count("seedrl: ") == 3


async def test_a_process_that_never_started_can_be_ended(tmp_path: Path) -> None:
    process = child(tmp_path, "")
    process.terminate()
    await process.ended(within=0.0)
    assert process.pid is None


def test_children_end_with_their_supervisor(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from services.local.process import ChildProcess
async def main():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    log = Path({str(tmp_path)!r}) / "log"
    process = ChildProcess("c", lambda: command, environment={{}}, log=log)
    await process.start()
    print(process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait(10)
    descriptor = None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 10)[0], "the child outlived its supervisor"
    os.close(descriptor)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_nice_child_stands_back_as_a_process_and_as_a_session(
    run: Callable[[Coroutine[Any, Any, int]], int], tmp_path: Path
) -> None:
    mine = autogroup_niceness()
    code = f"""
import os, pathlib
group = pathlib.Path({str(AUTOGROUP)!r})
print("seedrl:", os.nice(0), group.read_text().split()[-1] if group.exists() else "7")
"""
    command = [sys.executable, "-c", code]

    async def finished() -> int:
        await process.start()
        return await process.wait()

    process = ChildProcess("c", lambda: command, environment={}, log=tmp_path / "c.log", niceness=7)
    assert run(finished()) == 0
    assert process.last_words() == f"{os.nice(0) + 7} 7"
    assert autogroup_niceness() == mine


def autogroup_niceness() -> str | None:
    """Of this session; None where the kernel has no such thing, or this session is in no group of its own."""
    words = AUTOGROUP.read_text().split() if AUTOGROUP.exists() else []
    return words[-1] if words else None
