"""What actors say of themselves."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from services.local.watching import ActorAccount, ActorWatch, watched_actors
from shared.config import HttpSettings
from shared.http import new_registry, serving_http
from shared.telemetry import Progress
from tests.support.waiting import eventually

STEPS = {"waiting_for": [], "making_environments": False, "replaced_environments": 0, "last_crash": ""}
MAKES = {**STEPS, "waiting_for": ["the environments to be made"], "making_environments": True}


def waits(why: str) -> dict[str, Any]:
    return {**STEPS, "waiting_for": [f"inference at host:1 ({why})"]}


@asynccontextmanager
async def answering(status: Callable[[], dict[str, Any]]) -> AsyncIterator[str]:
    """The address of an actor's HTTP endpoints."""
    async with serving_http(
        HttpSettings(),
        service="actor",
        is_ready=list,
        status=status,
        registry=new_registry(),
        progress=Progress(),
    ) as port:
        yield f"127.0.0.1:{port}"


def test_an_actor_says_what_it_does_before_it_steps_and_for_how_long() -> None:
    account = ActorAccount(100.0)
    assert account.doing(102.0) == "starting for 2 s"
    account.answered(MAKES, 103.0)
    account.answered(MAKES, 130.0)
    assert account.doing(137.0) == "making environments for 34 s"
    account.answered(waits("UNAVAILABLE: 1"), 140.0)
    account.answered(waits("UNAVAILABLE: 2"), 144.0)
    assert account.doing(145.0) == "waiting for inference at host:1 (UNAVAILABLE: 2) for 5 s"
    account.answered(STEPS, 146.0)
    assert account.doing(150.0) == ""


def test_one_that_listens_and_does_not_answer_makes_environments() -> None:
    account = ActorAccount(100.0)
    account.was_silent(103.0)
    account.was_silent(104.0)
    assert account.doing(110.0) == "making environments for 7 s"
    account.was_away(111.0)
    assert account.doing(112.0) == "starting for 1 s"
    account.answered(waits("full"), 113.0)
    account.was_silent(114.0)
    assert account.doing(115.0).startswith("waiting for inference")


def test_replaced_environments_are_added_up_over_the_actors_restarts() -> None:
    account = ActorAccount(100.0)
    figures = [(0, ""), (3, "first"), (4, "second"), (0, ""), (0, ""), (2, "third"), (1, "fourth")]
    seen = []
    for replaced, last in figures:
        account.answered({**STEPS, "replaced_environments": replaced, "last_crash": last}, 101.0)
        seen.append((account.replaced, account.last_crash))
    expected = [(0, ""), (3, "first"), (4, "second"), (4, "second"), (4, "second"), (6, "third")]
    assert seen == [*expected, (7, "fourth")]


async def test_actors_are_asked_again_and_again() -> None:
    status = MAKES
    async with answering(lambda: status) as address, watched_actors(lambda: {"actor-0": address}) as watch:
        await eventually(lambda: "actor-0" in watch.accounts)
        account = watch.accounts["actor-0"]
        await eventually(lambda: account.doing(0.0).startswith("making"))
        status = {**STEPS, "replaced_environments": 3, "last_crash": "Crash: told"}
        await eventually(lambda: account.doing(0.0) == "")
    assert (account.replaced, account.last_crash) == (3, "Crash: told")


async def test_one_that_does_not_answer_keeps_nobody_from_being_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        addresses = {
            "deaf": f"127.0.0.1:{deaf.getsockname()[1]}",
            "nobody": f"127.0.0.1:{nobody.getsockname()[1]}",
        }
        async with (
            answering(lambda: STEPS) as address,
            answering(lambda: {"replay": "of another program"}) as other,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2.0)) as http,
        ):
            watch = ActorWatch(lambda: {**addresses, "steps": address, "another": other}, http)
            await watch.look()
    said = {name: account.doing(0.0).partition(" for")[0] for name, account in watch.accounts.items()}
    assert said == {"deaf": "making environments", "nobody": "starting", "steps": "", "another": "starting"}
