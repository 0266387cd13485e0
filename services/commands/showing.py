"""What `seedrl train` shows while its services run: a live table, or a line now and then."""

import asyncio
import contextlib
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from services.local.config import CONFIG_FILE
from services.local.display import (
    Standstill,
    actor_doing,
    actors_in_trouble,
    bottleneck,
    connected_actors,
    doing,
    headline,
    progress_line,
    services_table,
)
from services.local.run import LocalRun
from services.local.watching import ActorWatch
from shared.bus.statuses import StatusBoard

PLAIN_LINE_SECONDS = 5.0
TABLE_SECONDS = 0.5
SILENT_SECONDS = 5.0  # services speak each second
STANDSTILL_SECONDS = 8.0  # without a step more; some updates take long


@contextlib.asynccontextmanager
async def shown(
    console: Console, run: LocalRun, board: StatusBoard, actors: ActorWatch
) -> AsyncIterator[None]:
    """Shows a live table on a terminal, else a line now and then."""
    for line in joining(run):
        console.print(line, soft_wrap=True, highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            async with _repeated(lambda: live.update(_table(run, board, actors)), TABLE_SECONDS):
                yield
    else:
        standstill = Standstill()

        def show() -> None:
            console.print(_line(run, board, actors, standstill), soft_wrap=True)

        async with _repeated(show, PLAIN_LINE_SECONDS):
            yield


def joining(run: LocalRun) -> Iterator[str]:
    """How another actor joins the run, as a shell takes it."""
    settings = str(run.config.directory / CONFIG_FILE)
    join = ["seedrl", "actor", run.config.env, "--preset", settings, "--inference-url", run.inference_url]
    copies = "a copy of that file"
    if run.config.tls_ca is not None:  # which no preset holds
        join += ["--tls-ca", str(run.config.tls_ca)]
        copies = "copies of both files"
    yield f"another actor: {shlex.join(join)}"
    if run.outer_inference_url:
        address = shlex.join(["--inference-url", run.outer_inference_url])
        yield f"on another host: the same with {copies} and {address}"


@contextlib.asynccontextmanager
async def _repeated(show: Callable[[], None], seconds: float) -> AsyncIterator[None]:
    async def forever() -> None:
        while True:
            await asyncio.sleep(seconds)
            show()

    task = asyncio.create_task(forever())
    try:
        yield
    finally:
        task.cancel()
        show()


def statuses_of(run: LocalRun, board: StatusBoard, now: float) -> dict[str, dict[str, Any]]:
    """By service, what each but the actors said last; empty where it has said nothing since its start.

    Of one that runs and has fallen silent only for how long it has been, as `silent_seconds`.
    """
    statuses = {}
    for name, service in run.services.items():
        if name.startswith("actor"):
            continue
        status = board.newest(name)
        seen = status.get("seen", 0.0)
        if not status or seen <= service.died_at:
            status = {}
        elif service.state == "running" and now - seen > SILENT_SECONDS:
            status = {"silent_seconds": now - seen}
        statuses[name] = status
    return statuses


def _absences(
    run: LocalRun, statuses: Mapping[str, Mapping[str, Any]], actors: ActorWatch, now: float
) -> dict[str, str]:
    """Of each service that died and is not back, how often and how."""
    present = {name for name, status in statuses.items() if status} | connected_actors(statuses).keys()
    present |= {name for name, account in actors.accounts.items() if not account.doing(now)}
    return {
        name: service.deaths
        for name, service in run.services.items()
        if service.deaths
        and service.state != "done"
        and (name not in present or service.state == "restarting")
    }


def _line(run: LocalRun, board: StatusBoard, actors: ActorWatch, standstill: Standstill) -> str:
    now = time.monotonic()
    statuses = statuses_of(run, board, now)
    still = standstill.seconds(statuses["learner"].get("steps"), now)
    trouble = [f"{name} {deaths}" for name, deaths in _absences(run, statuses, actors, now).items()]
    trouble += actors_in_trouble(connected_actors(statuses), actors.accounts, now)
    return progress_line(
        statuses,
        total_steps=run.config.total_steps,
        trouble=trouble,
        stands_still=still >= STANDSTILL_SECONDS,
    )


def _table(run: LocalRun, board: StatusBoard, actors: ActorWatch) -> Group:
    now = time.monotonic()
    statuses = statuses_of(run, board, now)
    absences, connected = _absences(run, statuses, actors, now), connected_actors(statuses)
    does = {name: doing(name, status) for name, status in statuses.items()}
    does |= {name: actor_doing(connected.get(name), actors.accounts[name], now) for name in actors.accounts}
    rows = [
        {
            "service": name,
            "state": service.state,
            "restarts": service.restarts,
            "doing": "; ".join(part for part in (does.get(name, ""), absences.get(name)) if part),
        }
        for name, service in run.services.items()
    ]
    learner = statuses["learner"]
    silent = learner.get("silent_seconds")
    title = headline(board.newest("learner") if silent else learner, total_steps=run.config.total_steps)
    if silent:
        title += f"  ({silent:.0f} s ago)"
    return Group(services_table(rows, title=title), Text(bottleneck(learner, figures=True)))
