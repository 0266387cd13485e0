"""`run_service` in processes of its own: signals, exit statuses and what is said on stderr."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 20.0

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Starts a script that has `main(stop)` and runs it as a service; what it prints can be read."""

    def start(body: str, *, grace_seconds: float = 10.0) -> "subprocess.Popen[str]":
        script = tmp_path / "script.py"
        script.write_text(
            "import asyncio, multiprocessing, os, signal, sys, threading, time\n"
            "from shared.errors import *\n"
            "from shared.runtime import in_thread, run_service, run_until_stopped\n"
            "from shared.telemetry import configure_logging\n"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup may have started the tests
            f"{textwrap.dedent(body)}\n"
            "configure_logging('info', 'json', 'test')\n"
            f"sys.exit(run_service(main, grace_seconds={grace_seconds}))\n"
        )
        process = subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
        request.addfinalizer(lambda: (process.kill(), process.communicate()))
        return process

    return start


def said(process: "subprocess.Popen[str]", word: str) -> None:
    """Waits until the process has printed `word`."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit status, rest of stdout, stderr."""
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


DRAINING = """
    async def main(stop):
        print("ready")
        await stop.wait()
        print("draining")
        await asyncio.sleep(0.05)
        print("saved")
"""

STUCK = """
    async def main(stop):
        print("ready")
        await stop.wait()
        print("draining")
        await asyncio.Event().wait()
"""

BLOCKED = """
    def stuck_for_ever():
        while True:
            time.sleep(100)

    async def main(stop):
        print("ready")
        stuck_for_ever()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_exits_0(service: Start, number: signal.Signals) -> None:
    process = service(DRAINING)
    said(process, "ready")
    process.send_signal(number)
    assert ended(process) == (0, "draining\nsaved\n", "")


def test_under_nohup_a_hangup_ends_nothing(service: Start) -> None:
    process = service("signal.signal(signal.SIGHUP, signal.SIG_IGN)" + DRAINING.replace("    ", "", 1))
    said(process, "ready")
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert ended(process) == (0, "draining\nsaved\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_cleans_up_after_a_signal(service: Start, number: signal.Signals) -> None:
    body = """
    from shared.runtime import run_command

    async def work():
        try:
            print("ready")
            await asyncio.Event().wait()
        finally:
            print("removed")

    try:
        run_command(work())
    except KeyboardInterrupt:
        sys.exit(130)
    """
    process = service(body)
    said(process, "ready")
    process.send_signal(number)
    assert ended(process) == (130, "removed\n", "")


INTERRUPTED_WHILE_THE_LOOP_IS_MADE = """
    import uvloop
    from shared.runtime import run_command

    made = []

    class Loop(uvloop.Loop):
        def __init__(self):
            super().__init__()
            made.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    uvloop.Loop = Loop
"""


def test_a_signal_while_the_loop_is_made_drains_and_exits_0(service: Start) -> None:
    process = service(INTERRUPTED_WHILE_THE_LOOP_IS_MADE + DRAINING)
    assert ended(process) == (0, "ready\ndraining\nsaved\n", "")


def test_a_command_interrupted_while_its_loop_is_made_leaves_no_loop_open(service: Start) -> None:
    body = """
    async def work():
        await asyncio.Event().wait()

    configure_logging('info', 'json', 'test')
    try:
        run_command(work())
    except KeyboardInterrupt:
        print("closed:", made[0].is_closed())
    sys.exit(0)
    """
    assert ended(service(INTERRUPTED_WHILE_THE_LOOP_IS_MADE + body)) == (0, "closed: True\n", "")


def test_a_service_that_is_done_exits_0(service: Start) -> None:
    assert ended(service("async def main(stop): pass")) == (0, "", "")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_1_at_once(service: Start, second: signal.Signals) -> None:
    process = service(STUCK, grace_seconds=1000)
    said(process, "ready")
    process.terminate()
    said(process, "draining")
    process.send_signal(second)
    assert ended(process) == (1, "", f"seedrl: {second.name} after SIGTERM; ended at once\n")


def test_two_signals_end_a_blocked_event_loop(service: Start) -> None:
    process = service(BLOCKED, grace_seconds=1000)
    said(process, "ready")
    process.terminate()
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == 1
    assert err.endswith("ended at once\n")


def test_more_than_the_grace_period_exits_1_and_tells_where_it_hung(service: Start) -> None:
    process = service(STUCK, grace_seconds=0.2)
    said(process, "ready")
    process.terminate()
    status, _, err = ended(process)
    assert status == 1
    assert err.endswith("seedrl: still not ended 0.2 s after SIGTERM; gave up\n")
    assert "most recent call first" in err


def test_the_grace_period_holds_for_a_blocked_event_loop(service: Start) -> None:
    process = service(BLOCKED, grace_seconds=0.2)
    said(process, "ready")
    process.terminate()
    status, _, err = ended(process)
    assert status == 1
    assert "in stuck_for_ever" in err


def test_the_grace_period_holds_for_a_thread_that_does_not_return(service: Start) -> None:
    process = service(
        """
        def stuck_in_a_thread():
            print("ready")
            while True:
                time.sleep(100)

        async def main(stop):
            asyncio.get_running_loop().run_in_executor(None, stuck_in_a_thread)
            await stop.wait()
        """,
        grace_seconds=0.2,
    )
    said(process, "ready")
    process.terminate()
    status, _, err = ended(process)
    assert status == 1
    assert "in stuck_in_a_thread" in err


def test_an_expected_error_in_a_group_is_one_line_and_its_exit_status(service: Start) -> None:
    process = service(
        """
        async def fail():
            raise Refused("nats://host: wrong token\\nreally")

        async def main(stop):
            await run_until_stopped(run_until_stopped(fail(), stop=stop), asyncio.sleep(100), stop=stop)
        """
    )
    assert ended(process) == (4, "", "seedrl: nats://host: wrong token really\n")


def test_an_unexpected_error_is_logged_with_its_traceback_and_exits_1(service: Start) -> None:
    process = service(
        """
        async def fail_like_this():
            {}["key"]

        async def main(stop):
            await run_until_stopped(fail_like_this(), stop=stop)
        """
    )
    status, _, err = ended(process)
    assert status == 1
    logged, line = err.splitlines()
    assert logged.startswith("{")
    assert "in fail_like_this" in logged
    assert "Traceback" in logged
    assert line == "seedrl: unexpected error, see the traceback in the log: KeyError('key')"


SEVERAL = """
    async def fail(error, *, after):
        try:
            if after:
                await asyncio.Event().wait()
        finally:
            raise error

    async def main(stop):
        await run_until_stopped(fail({second}, after=True), fail({first}, after=False), stop=stop)
"""


def test_of_several_errors_the_first_decides(service: Start) -> None:
    process = service(SEVERAL.format(first="ConnectionFailed('first')", second="Refused('second')"))
    assert ended(process) == (3, "", "seedrl: first\n")


def test_a_bug_that_shows_while_an_expected_error_ends_the_service_is_still_logged(service: Start) -> None:
    status, _, err = ended(
        service(SEVERAL.format(first="ConnectionFailed('first')", second="KeyError('bug')"))
    )
    assert status == 3
    assert "KeyError: 'bug'" in err
    assert err.endswith("\nseedrl: first\n")


def test_a_cancellation_is_never_the_reason(service: Start) -> None:
    process = service(
        """
        async def main(stop):
            raise BaseExceptionGroup("", [asyncio.CancelledError(), ConnectionFailed("the reason")])
        """
    )
    assert ended(process) == (3, "", "seedrl: the reason\n")


def test_an_error_while_draining_decides_the_exit_status(service: Start) -> None:
    process = service(
        """
        async def main(stop):
            print("ready")
            await stop.wait()
            raise RunError("disk full")
        """
    )
    said(process, "ready")
    process.terminate()
    assert ended(process) == (2, "", "seedrl: disk full\n")


def test_ending_a_forked_child_does_not_end_the_service(service: Start) -> None:
    process = service(
        """
        def child(started):
            started.set()
            time.sleep(1000)

        async def main(stop):
            forked = multiprocessing.get_context("fork")
            started = forked.Event()
            process = forked.Process(target=child, args=(started,))
            process.start()
            started.wait()
            os.kill(process.pid, signal.SIGINT)  # what a terminal sends to all
            process.terminate()
            process.join()
            await asyncio.sleep(0.05)
            print("child", process.exitcode, "stop", stop.is_set())
            await stop.wait()
            print("stopped")
        """
    )
    said(process, "child -15 stop False")
    process.terminate()
    assert ended(process) == (0, "stopped\n", "")


def test_runtime_http_and_telemetry_need_neither_torch_nor_nats() -> None:
    script = (
        "import sys, shared.runtime, shared.http, shared.telemetry\n"
        "print(sorted({'torch', 'nats', 'zstandard', 'gymnasium'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
