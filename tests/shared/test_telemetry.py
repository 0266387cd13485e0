import asyncio
import logging
import os
import pty
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog
from structlog.testing import capture_logs

from shared.telemetry import Progress, all_stacks, configure_logging, get_logger, watchdog

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 20.0

log = get_logger("shared.test")  # before logging is configured, as modules do it


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, hook = logging.getLogger(), threading.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    threading.excepthook = hook
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("services", "shared"):
        logging.getLogger(name).setLevel(logging.NOTSET)


Captured = pytest.CaptureFixture[str]


def written(capsys: Captured) -> list[dict[str, Any]]:
    """The JSON objects on stderr, one a line."""
    out, err = capsys.readouterr()
    assert out == ""
    return [orjson.loads(line) for line in err.splitlines()]


def test_an_event_is_one_line_of_json_with_time_level_service_and_event(capsys: Captured) -> None:
    configure_logging("info", "json", "inference")
    log.info("stream opened", stream_id="a", rows=16)
    (line,) = written(capsys)
    assert list(line)[:4] == ["timestamp", "level", "service", "event"]
    stamp = datetime.fromisoformat(line.pop("timestamp"))
    assert stamp.utcoffset() == timedelta(0)
    assert line == {
        "level": "info",
        "service": "inference",
        "event": "stream opened",
        "stream_id": "a",
        "rows": 16,
        "logger": "shared.test",
    }


def test_a_traceback_stays_on_the_line_of_its_event(capsys: Captured) -> None:
    configure_logging("info", "json", "learner")
    try:
        raise KeyError("x")
    except KeyError:
        log.exception("failed")
        logging.getLogger("nats").exception("failed too")
    for line in written(capsys):
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert line["exception"].endswith("KeyError: 'x'")


def test_other_libraries_logs_look_the_same(capsys: Captured) -> None:
    configure_logging("info", "json", "actor")
    logging.getLogger("grpc._server").warning("%d calls of %s", 3, "Act")
    (line,) = written(capsys)
    assert (line["level"], line["service"], line["logger"]) == ("warning", "actor", "grpc._server")
    assert line["event"] == "3 calls of Act"


def test_warnings_are_events(capsys: Captured) -> None:
    script = """
        import warnings
        from shared.telemetry import configure_logging
        configure_logging("info", "json", "actor")
        warnings.warn("careful")
    """
    (line,) = run(script).stderr.splitlines()
    assert "careful" in orjson.loads(line)["event"]


@pytest.mark.parametrize(("error", "is_traced"), [("OSError(28, 'no space')", False), ("KeyError(1)", True)])
def test_a_thread_that_fails_is_one_event(error: str, is_traced: bool) -> None:
    script = f"""
        import threading
        from shared.telemetry import configure_logging
        configure_logging("info", "json", "actor")
        def fails():
            raise {error}
        thread = threading.Thread(target=fails, name="writer")
        thread.start()
        thread.join()
    """
    (line,) = map(orjson.loads, run(script).stderr.splitlines())
    assert (line["event"], line["level"], line["thread"]) == ("a thread failed", "error", "writer")
    assert line["reason"] in ("OSError: [Errno 28] no space", "KeyError: 1")
    assert ("Traceback" in line.get("exception", "")) == is_traced


@pytest.mark.parametrize(
    ("level", "heard"), [("debug", ["d", "i", "w", "e"]), ("info", ["i", "w", "e"]), ("error", ["e"])]
)
def test_less_severe_events_are_not_heard(level: str, heard: list[str], capsys: Captured) -> None:
    configure_logging(level, "json", "actor")
    for say, word in ((log.debug, "d"), (log.info, "i"), (log.warning, "w"), (log.error, "e")):
        say(word)
    assert [line["event"] for line in written(capsys)] == heard


def test_other_libraries_are_not_debugged(capsys: Captured) -> None:
    configure_logging("debug", "json", "actor")
    logging.getLogger("asyncio").debug("chatter")
    assert written(capsys) == []


def test_configuring_twice_does_not_write_twice(capsys: Captured) -> None:
    configure_logging("info", "json", "first")
    configure_logging("info", "json", "second")
    log.info("once")
    assert [line["service"] for line in written(capsys)] == ["second"]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (float("nan"), None),
        (Path("/runs"), "/runs"),
        (2**80, str(2**80)),
        ("\ud800", r"'\ud800'"),
        ("two\nlines", "two\nlines"),
        ({1: (2, None)}, {"1": [2, None]}),
    ],
)
def test_any_value_can_be_logged(value: Any, read: Any, capsys: Captured) -> None:
    configure_logging("info", "json", "actor")
    log.info("event", value=value)
    (line,) = written(capsys)
    assert line["value"] == read
    assert line["event"] == "event"


SECRET = 'sw0rd"fish'


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_secrets_are_never_written(
    log_format: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEDRL_NATS_TOKEN", "from-the-environment")
    configure_logging("info", log_format, "learner", secrets=[SECRET])
    log.info("by name", nats_token="abc-by-name", password=SECRET, Authorization="Bearer abc-by-name")
    log.info(f"in the text {SECRET}", options=["--nats-token", SECRET], environment=dict(os.environ))
    log.info("in a URL", url="nats://user:in-the-url@host:4222")
    logging.getLogger("nats").error("cannot reach %s", "nats://in-the-url@host:4222")
    try:
        raise ValueError(f"not {SECRET} nor from-the-environment")
    except ValueError:
        log.exception("in a traceback")
    err = capsys.readouterr().err
    for hidden in (
        SECRET,
        orjson.dumps(SECRET)[1:-1].decode(),
        "by-name",
        "in-the-url",
        "from-the-environment",
    ):
        assert hidden not in err
    assert "nats://***@host:4222" in err


def test_ordinary_values_are_not_taken_for_secrets(capsys: Captured) -> None:
    configure_logging("info", "json", "learner", secrets=["", "a"])
    log.info("started", tokens=5, url="nats://host:4222", at="a@b", preset="atari")
    (line,) = written(capsys)
    assert (line["tokens"], line["url"], line["at"], line["preset"]) == (
        5,
        "nats://host:4222",
        "a@b",
        "atari",
    )


def run(script: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm", **options.pop("env", {})},
        timeout=DEADLINE,
        check=True,
        text=True,
        **({"stderr": subprocess.PIPE} | options),
    )


HELLO = """
    from shared.telemetry import configure_logging, get_logger
    configure_logging("info", "{}", "actor")
    get_logger().info("hello", rows=16)
"""


def on_terminal(script: str, **options: Any) -> str:
    """What the script writes to a terminal on stderr."""
    ours, theirs = pty.openpty()
    try:
        run(script, stderr=theirs, **options)
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_text_on_a_terminal_has_colours() -> None:
    text = on_terminal(HELLO.format("auto"))
    assert "hello" in text
    assert "\x1b[" in text


def test_text_has_no_colours_where_they_are_not_wanted() -> None:
    assert "\x1b[" not in on_terminal(HELLO.format("text"), env={"NO_COLOR": "1"})


def test_text_in_a_file_has_no_colours() -> None:
    text = run(HELLO.format("text")).stderr
    assert "hello" in text
    assert "rows=16" in text
    assert "\x1b[" not in text


def test_auto_is_json_where_no_terminal_is() -> None:
    assert orjson.loads(run(HELLO.format("auto")).stderr)["event"] == "hello"


def test_json_on_a_terminal_stays_json() -> None:
    assert orjson.loads(on_terminal(HELLO.format("json")))["event"] == "hello"


# Progress


def test_what_beats_is_not_stalled() -> None:
    progress = Progress()
    progress.beat("loop")
    assert progress.stalled(time.monotonic(), 1.0) is None


def test_what_never_beat_is_not_expected_to() -> None:
    assert Progress().stalled(time.monotonic() + 1000, 1.0) is None


def test_what_is_silent_for_too_long_is_named_with_its_silence() -> None:
    progress = Progress()
    progress.beat("loop")
    progress.beat("model thread")
    later = time.monotonic() + 60
    assert (
        progress.stalled(later, 50.0)
        == "loop made no progress for 60 s; model thread made no progress for 60 s"
    )
    progress.forget("loop")
    assert progress.stalled(later, 50.0) == "model thread made no progress for 60 s"
    assert progress.stalled(later, 70.0) is None


def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_stall_is_logged_once_with_all_stacks_and_again_when_it_returns() -> None:
    progress, release = Progress(), threading.Event()
    thread = threading.Thread(target=release.wait, name="worker", daemon=True)
    thread.start()
    progress.beat("worker")
    with capture_logs() as logs, watchdog(progress, 0.1):
        until(lambda: logs)
        time.sleep(0.2)  # in which it could be logged again
        assert [entry["event"] for entry in logs] == ["no progress"]
        progress.beat("worker")
        until(lambda: len(logs) > 1)
        assert logs[1]["event"] == "progress again"
        until(lambda: len(logs) > 2)
        assert logs[2]["event"] == "no progress"
    release.set()
    thread.join()
    assert logs[0]["reasons"].startswith("worker made no progress for ")
    assert "thread worker:\n" in logs[0]["stack"]
    assert "test_a_stall_is_logged_once" in logs[0]["stack"]


def test_the_watchdog_ends_with_its_context() -> None:
    with watchdog(Progress(), 60.0):
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


async def test_stacks_show_what_a_task_awaits_down_to_the_last_call() -> None:
    async def inner() -> None:
        await asyncio.Event().wait()

    async def outer() -> None:
        await inner()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(outer(), name="stuck one")
        await asyncio.sleep(0)
        text = await asyncio.to_thread(all_stacks, asyncio.get_running_loop())
        task.cancel()
    stuck = text[text.index("task stuck one:\n") :]
    assert stuck.index("in outer") < stuck.index("in inner") < stuck.index("in wait")


def test_stacks_are_written_even_while_native_code_keeps_the_interpreter_lock() -> None:
    script = """
        import ctypes, time
        from shared.telemetry import Progress, watchdog

        def native_code():
            ctypes.PyDLL(None).sleep(3)  # unlike CDLL, PyDLL keeps the lock

        with watchdog(Progress(), 0.1):
            time.sleep(0.3)
            native_code()
    """
    assert "in native_code" in run(script).stderr
