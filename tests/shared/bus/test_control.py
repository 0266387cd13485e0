import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import orjson
import pytest
from structlog.testing import capture_logs

from shared.bus.beside import beside
from shared.bus.connection import Bus
from shared.bus.control import publish_status, request_control, serve_control
from shared.errors import ConnectionFailed, RunError
from tests.support.nats import NatsRun, OwnNats
from tests.support.statuses import collect_statuses
from tests.support.waiting import eventually

Handlers = Mapping[str, Callable[[], Awaitable[str]]]


def saying(words: str, seconds: float = 0.0) -> Callable[[], Awaitable[str]]:
    async def handle() -> str:
        await asyncio.sleep(seconds)
        return words

    return handle


@asynccontextmanager
async def serving(bus: Bus, service: str, service_id: str, handlers: Handlers) -> AsyncIterator[None]:
    """A service that can be asked for its control."""
    async with beside(serve_control(bus, service, service_id, handlers, lambda: {"steps": 7})):
        await eventually(lambda: asked(bus, service, service_id))
        yield


async def asked(bus: Bus, service: str, service_id: str) -> bool:
    replies = await request_control(bus, "status", timeout=1, quiet=0.05)
    return {"service": service, "id": service_id, "status": {"steps": 7}} in replies


async def test_every_service_with_a_handler_answers_in_its_words(nats: NatsRun) -> None:
    async with (
        nats.bus() as one,
        nats.bus() as two,
        nats.bus(patient=False) as command,
        serving(one, "inference", "a", {"pause": saying("paused 3 groups"), "stop": saying("stopping")}),
        serving(two, "learner", "b", {"stop": saying("saved and stopped")}),
    ):
        assert await request_control(command, "pause", timeout=10) == [
            {"service": "inference", "id": "a", "done": "paused 3 groups"}
        ]
        replies = await request_control(command, "stop", timeout=10)
        assert {reply["service"]: reply["done"] for reply in replies} == {
            "inference": "stopping",
            "learner": "saved and stopped",
        }


async def test_a_slow_answer_is_waited_for_when_others_have_long_answered(nats: NatsRun) -> None:
    async with (
        nats.bus() as bus,
        serving(bus, "inference", "a", {"stop": saying("stopping")}),
        serving(bus, "learner", "b", {"stop": saying("saved", seconds=0.5)}),
    ):
        replies = await request_control(bus, "stop", timeout=10, quiet=0.05)
        assert {reply["done"] for reply in replies} == {"stopping", "saved"}


async def test_asking_does_not_last_longer_than_the_answers(nats: NatsRun) -> None:
    async with nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": saying("saved")}):
        started = time.monotonic()
        assert len(await request_control(bus, "checkpoint", timeout=60)) == 1
        assert time.monotonic() - started < 30  # of 60


async def test_who_heard_and_does_not_finish_is_named(nats: NatsRun) -> None:
    async with nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": saying("saved", seconds=60)}):
        (reply,) = await request_control(bus, "checkpoint", timeout=2)
        words = "heard, but has not finished within 2 s"
        assert reply == {"service": "learner", "id": "b", "done": words, "failed": 3}


async def test_nobody_is_waited_for_where_nobody_listens(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        started = time.monotonic()
        assert await request_control(bus, "stop", timeout=60) == []
        assert time.monotonic() - started < 30  # of 60


async def test_a_service_is_silent_on_a_verb_that_is_not_for_it(nats: NatsRun) -> None:
    async with nats.bus() as bus, serving(bus, "learner", "b", {}):
        assert await request_control(bus, "pause", timeout=0.3) == []


async def test_a_failure_is_told_to_who_asked_and_the_service_goes_on(nats: NatsRun) -> None:
    async def fail() -> str:
        raise RunError("the disk is full")

    async with nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": fail}):
        for _ in range(2):
            (reply,) = await request_control(bus, "checkpoint", timeout=10)
            assert reply["done"] == "failed: the disk is full"
            assert reply["failed"] == RunError.exit_status


async def test_a_bug_in_a_handler_ends_the_service(nats: NatsRun) -> None:
    async def bug() -> str:
        raise KeyError("a bug")

    async def serve() -> None:
        async with nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": bug}):
            await request_control(bus, "checkpoint", timeout=10)
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(serve(), 10)
    assert caught.group_contains(KeyError, match="a bug")


async def test_a_status_is_published_each_second_by_every_service(nats: NatsRun) -> None:
    async with (
        nats.bus() as bus,
        serving(bus, "inference", "host.domain-7", {}),
        serving(bus, "learner", "b", {}),
    ):
        statuses = await collect_statuses(bus, 1.5)
        assert sorted(statuses, key=lambda status: str(status["service"])) == [
            {"service": "inference", "id": "host.domain-7", "steps": 7},
            {"service": "learner", "id": "b", "steps": 7},
        ]


async def test_a_status_that_no_message_holds_comes_without_its_largest_fields_and_a_warning(
    nats: NatsRun,
) -> None:
    async with nats.bus() as bus, nats.bus(patient=False) as command:
        status = {"steps": 7, "streams": ["x" * bus.max_payload], "actors": "y" * bus.max_payload}
        shown = {"service": "inference", "id": "a", "steps": 7}
        heard = await command.nc.subscribe(bus.subjects.status("*", "*"))
        await command.nc.flush()
        with capture_logs() as logs:
            async with beside(serve_control(bus, "inference", "a", {}, lambda: status)):
                for _ in range(2):
                    message = await heard.next_msg(timeout=10)
                    assert orjson.loads(message.data) == shown
                (reply,) = await request_control(command, "status", timeout=10)
                assert reply["status"] == {"steps": 7}
        (warning,) = [event for event in logs if event["log_level"] == "warning"]
        assert sorted(warning["left_out"]) == ["actors", "streams"]


async def test_the_subject_of_a_status_names_service_and_id_as_two_words(nats: NatsRun) -> None:
    async with nats.bus() as bus:
        heard = await bus.nc.subscribe(bus.subjects.status("*", "*"))
        await publish_status(bus, "actor", "host.domain 7", {"steps": 1})
        message = await heard.next_msg(timeout=10)
        assert message.subject == bus.subjects.status("actor", "host-domain-7")
        assert orjson.loads(message.data) == {"service": "actor", "id": "host.domain 7", "steps": 1}


async def test_control_outlives_a_restart_of_the_server(own_nats: OwnNats) -> None:
    async with own_nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": saying("saved")}):
        await own_nats.kill()
        await eventually(lambda: not bus.is_connected)
        with pytest.raises(ConnectionFailed):
            await request_control(bus, "checkpoint", timeout=1)
        await own_nats.start()
        await bus.connected()
        assert await request_control(bus, "checkpoint", timeout=10) == [
            {"service": "learner", "id": "b", "done": "saved"}
        ]


async def test_two_runs_are_controlled_apart(nats: NatsRun) -> None:
    async with (
        nats.bus() as bus,
        nats.bus(run_id=f"{nats.run_id}-2") as other,
        serving(bus, "learner", "b", {"stop": saying("stopped")}),
    ):
        assert await request_control(other, "stop", timeout=1) == []


async def test_handlers_are_at_no_more_than_64_requests_at_once(nats: NatsRun) -> None:
    running, let_go = 0, asyncio.Event()

    async def handle() -> str:
        nonlocal running
        running += 1
        await let_go.wait()
        return "saved"

    async with nats.bus() as bus, serving(bus, "learner", "b", {"checkpoint": handle}):
        for wanted in (50, 64):
            for _ in range(50):
                await bus.nc.publish(bus.subjects.control("checkpoint"), b"")
            await eventually(lambda wanted=wanted: running >= wanted)  # type: ignore[misc]
        await eventually(lambda: asked(bus, "learner", "b"))
        assert running == 64
        let_go.set()
        (reply,) = await request_control(bus, "checkpoint", timeout=10)
        assert reply["done"] == "saved"
