"""Logs, heartbeats and the watchdog that says where a process hangs; knows no service."""

import asyncio
import contextlib
import faulthandler
import functools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, MutableMapping
from types import FrameType
from typing import Any, TextIO

import orjson
import structlog

from shared.config import SECRETS
from shared.presets import ENV_PREFIX

_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|authorization)$", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s\"']+(?=@)")
_HIDDEN = "***"
_SHORTEST_SECRET = 4  # shorter ones stand in ordinary words
_FIRST_KEYS = ("timestamp", "level", "service", "event")
_MOST_TASKS = 200  # in one dump of stacks


def get_logger(name: str | None = None) -> structlog.stdlib.BoundLogger:
    """A logger for events: `log.info("stream opened", rows=16)`; may be made before `configure_logging`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(*([name] if name else []))
    return logger


def configure_logging(log_level: str, log_format: str, service: str, *, secrets: Iterable[str] = ()) -> None:
    """Sends every event, also those of other libraries' loggers and failed threads, to stderr.

    `log_format`: json, one object a line with timestamp, level, service and event; text, readable, coloured
    on a terminal only; auto, text on a terminal, else json. `secrets`, those in the environment and
    credentials within URLs are never written. Other libraries are heard from level info up.
    """
    level = logging.getLevelNamesMapping()[log_level.upper()]
    on_terminal = sys.stderr.isatty()
    as_text = log_format == "text" or (log_format == "auto" and on_terminal)
    enrich: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        functools.partial(_with_service, service),
        _without_secret_values,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *enrich,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    render = _text(colours=on_terminal and not os.environ.get("NO_COLOR")) if as_text else _json()
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(enrich, render, _hidden_values(secrets)))
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO), force=True)
    for ours in ("services", "shared"):
        logging.getLogger(ours).setLevel(level)
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed


def _thread_failed(failed: threading.ExceptHookArgs) -> None:
    """Of what the system said no, as a full disk does, whoever started the thread tells more."""
    if failed.exc_type is SystemExit:
        return
    thread = failed.thread.name if failed.thread is not None else None
    log = get_logger(__name__).bind(thread=thread, reason=f"{failed.exc_type.__name__}: {failed.exc_value}")
    if isinstance(failed.exc_value, OSError):
        log.error("a thread failed")
    elif failed.exc_value is not None:
        log.error("a thread failed", exc_info=failed.exc_value)


class Progress:
    """When each part of a process last made progress; safe to use from all threads."""

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}

    def beat(self, name: str) -> None:
        """`name` makes progress: to be called again and again, also while it merely waits for work."""
        self._beats[name] = time.monotonic()

    def forget(self, name: str) -> None:
        """`name` has ended and is no longer expected to make progress."""
        self._beats.pop(name, None)

    def stalled(self, now: float, limit: float) -> str | None:
        """Words for what made no progress for more than `limit` seconds before `now` (monotonic), or None."""
        silent = {name: now - beat for name, beat in self._beats.copy().items() if now - beat > limit}
        return (
            "; ".join(f"{name} made no progress for {seconds:.0f} s" for name, seconds in silent.items())
            or None
        )


@contextlib.contextmanager
def watchdog(
    progress: Progress, limit_seconds: float, *, loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[None]:
    """Logs the stacks of all threads, and of `loop`'s tasks, once whenever `progress` stalls.

    It runs in a thread, so that it sees a blocked event loop. If even that thread cannot run, because native
    code keeps the interpreter lock, the stacks go to stderr as plain text.
    """
    done = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(progress, limit_seconds, loop, done), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def all_stacks(loop: asyncio.AbstractEventLoop | None = None) -> str:
    """Where every other thread, and every task of `loop`, is now; innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places = [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    with contextlib.suppress(RuntimeError):  # the tasks changed while they were listed
        tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()) if loop else []
        places += [
            f"task {task.get_name()}:\n" + "".join(map(_place, _awaiting(task)))
            for task in tasks[:_MOST_TASKS]
        ]
    return "\n".join(places)


def _watch(
    progress: Progress, limit: float, loop: asyncio.AbstractEventLoop | None, done: threading.Event
) -> None:
    log = get_logger(__name__)
    stderr = _file_of_stderr()
    reported = False
    while not done.wait(min(1.0, limit / 4)):
        if stderr is not None:
            faulthandler.dump_traceback_later(1.0 + limit, file=stderr)
        reasons = progress.stalled(time.monotonic(), limit)
        if reasons and not reported:
            log.error("no progress", reasons=reasons, stack=all_stacks(loop))
        elif reported and not reasons:
            log.warning("progress again")
        reported = reasons is not None
    if stderr is not None:
        faulthandler.cancel_dump_traceback_later()


def _file_of_stderr() -> TextIO | None:
    """Stderr if it is a real file; what replaces it in tests and notebooks may not be."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.fileno()
        return sys.stderr
    return None


def _awaiting(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """The frames of a suspended task from its coroutine to what it awaits."""
    inner: Any = task.get_coro()
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None)
        if frame is not None:
            yield frame
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)


def _place(frame: FrameType) -> str:
    return "".join(traceback.format_list(traceback.extract_stack(frame, limit=1)))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Renders events; the last thing it does is to strike out secrets, wherever in the text they stand."""

    def __init__(
        self,
        enrich: list[structlog.typing.Processor],
        render: list[structlog.typing.Processor],
        hidden: re.Pattern[str] | None,
    ) -> None:
        super().__init__(
            foreign_pre_chain=enrich,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
        self._hidden = hidden

    def format(self, record: logging.LogRecord) -> str:
        text = _URL_CREDENTIALS.sub(_HIDDEN, super().format(record))
        return self._hidden.sub(_HIDDEN, text) if self._hidden else text


def _text(*, colours: bool) -> list[structlog.typing.Processor]:
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)]


def _json() -> list[structlog.typing.Processor]:
    return [structlog.processors.format_exc_info, _as_json]


def _as_json(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    ordered = {key: event[key] for key in _FIRST_KEYS if key in event} | dict(event)
    try:
        return _dumps(ordered)
    except TypeError:  # an event is not lost because one of its values cannot be written
        return _dumps({ascii(key)[1:-1]: _writable(value) for key, value in ordered.items()})


def _dumps(value: Any) -> str:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _writable(value: Any) -> Any:
    try:
        _dumps(value)
    except TypeError:
        return ascii(value)
    return value


def _with_service(service: str, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.setdefault("service", service)
    return event


def _without_secret_values(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in event:
        if _SECRET_KEY.search(key):
            event[key] = _HIDDEN
    return event


def _hidden_values(secrets: Iterable[str]) -> re.Pattern[str] | None:
    """What matches any of the secrets, as they are and as JSON writes them."""
    known = {*secrets, *(os.environ.get(ENV_PREFIX + name.upper(), "") for name in SECRETS)}
    values = {value for value in known if len(value) >= _SHORTEST_SECRET}
    values |= {orjson.dumps(value)[1:-1].decode() for value in values}
    longest_first = sorted(values, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if values else None
