"""The newest status of every service, from real messages."""

from shared.bus.control import publish_status
from shared.bus.statuses import StatusBoard, watched_statuses
from tests.support.nats import NatsRun
from tests.support.waiting import eventually


def test_counters_of_services_that_died_are_kept() -> None:
    board = StatusBoard()
    assert board.newest("inference") == {}
    board.note("inference", "a", {"discarded_steps": 3})
    board.note("inference", "a", {"discarded_steps": 5})
    board.note("inference", "b", {"discarded_steps": 1})
    board.note("learner", "c", {"steps": 9})
    assert board.total("inference", "discarded_steps") == 6
    assert board.newest("inference")["discarded_steps"] == 1
    assert board.newest("learner")["steps"] == 9


async def test_the_board_follows_what_services_publish(nats: NatsRun) -> None:
    async with nats.bus() as bus, watched_statuses(bus) as board:
        await publish_status(bus, "learner", "host-1", {"steps": 1})
        await publish_status(bus, "learner", "host-1", {"steps": 2})
        await eventually(lambda: board.newest("learner").get("steps") == 2)
