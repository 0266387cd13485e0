"""The supervisor: what it starts again, what it gives up, and how its children end."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.local.process import ChildProcess
from services.local.supervisor import RestartPolicy, ServiceFailed, SupervisedService


def child(tmp_path: Path, code: str, **environment: str) -> ChildProcess:
    command = [sys.executable, "-c", code]
    return ChildProcess("child", lambda: command, environment=environment, log=tmp_path / "child.log")


def test_a_service_that_dies_now_and_then_is_started_again_for_ever() -> None:
    policy = RestartPolicy(max_crashes=2, window_seconds=60)
    assert all(policy.delay_after_crash(100.0 * i) is not None for i in range(50))


def test_a_service_that_keeps_dying_is_given_up() -> None:
    policy = RestartPolicy(max_crashes=2, window_seconds=60)
    delays = [policy.delay_after_crash(float(i)) for i in range(3)]
    assert delays[0] is not None
    assert delays[1] is not None
    assert delays[0] < delays[1]
    assert delays[2] is None


async def test_a_crashed_service_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    code = f"import os; p = {str(mark)!r}\nif not os.path.exists(p): open(p, 'w').close(); os._exit(9)"
    service = SupervisedService(child(tmp_path, code))
    await asyncio.wait_for(service.run_until_done(), 20)
    assert service.restarts == 1


async def test_a_mistake_of_the_user_is_final_and_said_in_its_own_words(tmp_path: Path) -> None:
    code = "import sys; print('noise'); print('seedrl: unknown environment X', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ServiceFailed, match="child: unknown environment X") as caught:
        await SupervisedService(child(tmp_path, code)).run_until_done()
    assert caught.value.exit_status == 2


async def test_a_service_is_ended_by_sigterm_and_killed_after_the_grace_period(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)"
    )
    service = SupervisedService(child(tmp_path, code))
    running = asyncio.create_task(service.run_until_done())
    async with asyncio.timeout(20):
        while not (tmp_path / "ready").exists():  # noqa: ASYNC110 — a file has no event
            await asyncio.sleep(0.01)
    await service.end(grace_seconds=0.2)
    await asyncio.wait_for(running, 5)
    assert service.state == "done"


async def test_settings_of_the_persons_environment_do_not_reach_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_SEED", "1")
    process = child(
        tmp_path,
        "import os; print('seed', os.environ.get('SEEDRL_SEED'), os.environ['SEEDRL_X'])",
        SEEDRL_X="2",
    )
    await process.start()
    assert await process.wait() == 0
    assert process.last_words() == "seed None 2"


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
    import select

    assert select.select([descriptor], [], [], 10)[0], "the child outlived its supervisor"
    os.close(descriptor)
