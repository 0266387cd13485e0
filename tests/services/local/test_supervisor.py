"""The supervisor: what it starts again, what it gives up, and how its children end."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from services.local import supervisor
from services.local.process import ChildProcess
from services.local.supervisor import RestartPolicy, ServiceFailed, SupervisedService
from tests.support.waiting import eventually


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


def test_a_service_that_takes_long_to_die_is_given_up_unless_the_run_comes_on() -> None:
    policy = RestartPolicy(max_crashes=2, window_seconds=60)
    assert all(policy.delay_after_crash(100.0 * i, steps=i // 2) is not None for i in range(20))
    assert policy.delay_after_crash(2000.0, steps=9) is None


async def test_a_crashed_service_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    code = f"import os; p = {str(mark)!r}\nif not os.path.exists(p): open(p, 'w').close(); os._exit(9)"
    service = SupervisedService(child(tmp_path, code))
    before = time.monotonic()
    await asyncio.wait_for(service.run_until_done(), 20)
    assert service.restarts == 1
    assert before < service.died_at < time.monotonic()
    assert service.deaths == f"died once with status 9: see {tmp_path / 'child.log'}"


async def test_a_service_that_ends_while_the_run_goes_on_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LULL_SECONDS", 0.5)
    service = SupervisedService(child(tmp_path, ""), ends_the_run=False)
    running = asyncio.create_task(service.run_until_done())
    before = time.monotonic()
    await eventually(lambda: service.restarts == 2, 20)
    assert time.monotonic() - before >= 0.5
    assert service.deaths == f"ended 2 times, at last by itself: see {tmp_path / 'child.log'}"
    await service.end(grace_seconds=5)
    await asyncio.wait_for(running, 5)


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
    failed = await service.end(grace_seconds=0.2)
    await asyncio.wait_for(running, 5)
    assert service.state == "done"
    assert str(failed) == "child was killed (signal 9) before it had saved"


@pytest.mark.parametrize("status", [0, 2])
async def test_what_keeps_a_service_from_a_good_end_is_said_in_its_own_words(
    status: int, tmp_path: Path
) -> None:
    code = (
        "import signal, sys\n"
        "def end(*_): print('seedrl: cannot write', file=sys.stderr); sys.exit(int(sys.argv[1]))\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close(); signal.pause()"
    )
    command = [sys.executable, "-c", code, str(status)]
    process = ChildProcess("child", lambda: command, environment={}, log=tmp_path / "child.log")
    service = SupervisedService(process)
    running = asyncio.create_task(service.run_until_done())
    await eventually((tmp_path / "ready").exists, 20)
    failed = await service.end(grace_seconds=20)
    await asyncio.wait_for(running, 5)
    said = None if failed is None else (str(failed), failed.exit_status)
    assert said == (("child: cannot write", 2) if status else None)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_service_that_had_not_begun_or_that_was_to_be_killed_has_not_failed(
    is_killed: bool, tmp_path: Path
) -> None:
    service = SupervisedService(child(tmp_path, "import time; time.sleep(60)"))
    running = asyncio.create_task(service.run_until_done())
    await eventually(lambda: service.process.pid is not None, 20)
    if is_killed:
        service.kill()
    assert await service.end(grace_seconds=5) is None
    await asyncio.wait_for(running, 5)


async def test_a_service_that_is_just_being_started_is_ended_too(tmp_path: Path) -> None:
    service = SupervisedService(child(tmp_path, "import time; time.sleep(60)"))
    running = asyncio.create_task(service.run_until_done())
    await asyncio.sleep(0)  # it has begun to start
    await asyncio.wait_for(service.end(grace_seconds=5), 10)
    await asyncio.wait_for(running, 10)
    assert service.process.pid is None


async def test_a_service_that_waits_to_be_started_again_ends_at_once(tmp_path: Path) -> None:
    service = SupervisedService(child(tmp_path, "import os; os._exit(9)"))
    service._policy = RestartPolicy(crashes=[time.monotonic()] * 4)  # the next wait is 3.2 s
    running = asyncio.create_task(service.run_until_done())
    await eventually(lambda: service.state == "restarting", 20)
    failed = await asyncio.wait_for(service.end(grace_seconds=5), 2)
    await asyncio.wait_for(running, 2)
    assert failed is not None
    assert failed.exit_status == 9


async def test_a_service_that_said_nothing_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServiceFailed, match=r"child: see .*/child\.log"):
        await SupervisedService(child(tmp_path, "print('noise'); raise SystemExit(2)")).run_until_done()
