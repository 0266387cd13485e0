"""Control and status of a run's services; knows nothing of what a verb does.

A request goes to every service of the run. Who has a handler says at once that it heard (so that the asker
knows for whom to wait), and answers with words when it is done; who has none is silent.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import nats.errors
import orjson
import structlog
from nats.aio.msg import Msg

from shared.bus.connection import Bus
from shared.bus.trouble import trouble
from shared.errors import ConnectionFailed, SeedrlError

STATUS_SECONDS = 1.0
QUIET_SECONDS = 0.3
_MAX_REQUESTS = 64  # at once
_NAME_BYTES = 1024  # of a message, for whose status it is

log = structlog.get_logger(__name__)

Handler = Callable[[], Awaitable[str]]
Status = Callable[[], dict[str, Any]]
Reply = dict[str, Any]


async def serve_control(
    bus: Bus, service: str, service_id: str, handlers: Mapping[str, Handler], status: Status
) -> None:
    """Answers control requests and publishes the status each second, until it is cancelled.

    A handler returns what it did, in words. Its SeedrlError is told to who asked; any other exception ends
    this coroutine. The verb `status` is answered with `status()`. While handlers are at 64
    requests, further ones are dropped.
    """
    me = {"service": service, "id": service_id}
    answered: set[asyncio.Task[None]] = set()

    async def show(message: Msg) -> None:
        shown, _ = _fitting(status(), bus.max_payload)
        await _reply(bus, message, {**me, "status": shown})

    async def take(message: Msg) -> None:
        verb = message.subject.rpartition(".")[2]
        if verb == "status":
            group.create_task(show(message))
        elif verb in handlers and len(answered) < _MAX_REQUESTS:
            task = group.create_task(_answer(bus, message, me, handlers[verb]))
            answered.add(task)
            task.add_done_callback(answered.discard)

    await bus.connected()
    async with asyncio.TaskGroup() as group:
        subscription = await bus.nc.subscribe(bus.subjects.control("*"), cb=take)
        try:
            await _publish_statuses(bus, service, service_id, status)
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()


async def request_control(
    bus: Bus, verb: str, *, timeout: float, quiet: float = QUIET_SECONDS
) -> list[Reply]:
    """Asks all services of the run; their replies: `service`, `id` and `done` (words), or `status` (a dict).

    Where a service failed, `failed` is the exit status that belongs to it.

    Returns when all that heard have answered and nobody new has for `quiet` seconds, else after `timeout`
    seconds; who heard and did not answer by then is in the list with words that say so. Empty, at once, when
    there is no service. Raises ConnectionFailed.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    arrived: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by the number of services

    async def take(message: Msg) -> None:
        arrived.put_nowait(message)

    replies: dict[tuple[str, str], Reply] = {}
    inbox = bus.nc.new_inbox()
    with trouble(f"control {verb}"):
        subscription = await bus.nc.subscribe(inbox, cb=take)
        await bus.nc.publish(bus.subjects.control(verb), reply=inbox)
    try:
        while (remaining := deadline - loop.time()) > 0:
            all_answered = bool(replies) and all(_is_answer(reply) for reply in replies.values())
            async with asyncio.timeout(min(quiet, remaining) if all_answered else remaining):
                message = await arrived.get()
            if not message.data:
                break  # the server: nobody listens
            reply = orjson.loads(message.data)
            replies[reply["service"], reply["id"]] = reply
    except TimeoutError:
        pass
    finally:
        with suppress(nats.errors.Error):
            await subscription.unsubscribe()
    words = f"heard, but has not finished within {timeout:g} s"
    late = {"done": words, "failed": ConnectionFailed.exit_status}
    return [reply if _is_answer(reply) else {**reply, **late} for reply in replies.values()]


async def publish_status(bus: Bus, service: str, service_id: str, status: dict[str, Any]) -> list[str]:
    """Publishes one status, its service and id added. Best effort: nothing happens without a connection.

    Of one that is too large for a message the largest fields are left out; returns their names.
    """
    subject = bus.subjects.status(service, re.sub(r"[^A-Za-z0-9_-]", "-", service_id))
    with suppress(nats.errors.Error, ConnectionFailed):
        shown, left_out = _fitting(status, bus.max_payload)
        await bus.nc.publish(subject, _dumps({**shown, "service": service, "id": service_id}))
        return left_out
    return []


async def _publish_statuses(bus: Bus, service: str, service_id: str, status: Status) -> None:
    complained = False
    while True:
        left_out = await publish_status(bus, service, service_id, status())
        if left_out and not complained:
            complained = True
            log.warning("status too large for a NATS message", left_out=left_out, max_payload=bus.max_payload)
        await asyncio.sleep(STATUS_SECONDS)


def _fitting(status: dict[str, Any], max_bytes: int) -> tuple[dict[str, Any], list[str]]:
    """The status without its largest fields, as many as it takes; and their names."""
    shown, left_out = status, []
    while shown and len(_dumps(shown)) > max_bytes - _NAME_BYTES:
        largest = max(shown, key=lambda field: len(_dumps(shown[field])))
        shown = {field: value for field, value in shown.items() if field != largest}
        left_out.append(largest)
    return shown, left_out


async def _answer(bus: Bus, message: Msg, me: Reply, handler: Handler) -> None:
    await _reply(bus, message, me)
    try:
        answer: Reply = {"done": await handler()}
    except SeedrlError as error:
        answer = {"done": f"failed: {error}", "failed": error.exit_status}
    await _reply(bus, message, {**me, **answer})


async def _reply(bus: Bus, message: Msg, reply: Reply) -> None:
    if message.reply:
        with suppress(nats.errors.Error):
            await bus.nc.publish(message.reply, _dumps(reply))


def _is_answer(reply: Reply) -> bool:
    return "done" in reply or "status" in reply


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
