"""`seedrl train`: NATS, the supervisor, the display and the summary around one local run."""

import asyncio
import contextlib
import shlex
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from services.actor.environments import resolved
from services.commands.config import EvalConfig
from services.learner.accounts import CHECKPOINTS, COMPLETED
from services.learner.replay_counts import replay_counts
from services.local.config import CONFIG_FILE, TrainConfig
from services.local.connection import published_connection
from services.local.directory import configured, used_directory
from services.local.display import (
    actor_doing,
    actors_in_trouble,
    bottleneck,
    doing,
    headline,
    services_table,
)
from services.local.nats import nats_of_run
from services.local.run import LocalRun
from services.local.summary import (
    SUMMARY_FILE,
    discarded_before,
    save_summary,
    untrained_queue,
    write_summary,
)
from services.local.watching import ActorWatch, watched_actors
from shared.bus.connection import connected_bus
from shared.bus.statuses import StatusBoard, watched_statuses
from shared.config import secret_values
from shared.errors import ConnectionFailed, SeedrlError
from shared.runtime import run_command
from shared.telemetry import configure_logging

PLAIN_LINE_SECONDS = 5.0
TABLE_SECONDS = 0.5


def train(config: TrainConfig) -> int:
    """Runs a whole training; returns the exit status."""
    configure_logging(config.log_level, config.log_format, "supervisor", secrets=secret_values(config))
    if ":" in config.network:
        from shared.networks.build import check_network_name  # torch, which nothing else here needs

        check_network_name(config.network)
    if ":" not in config.env:  # else the module that registers it is the actors' to import
        resolved(config.env)
    console = Console(markup=False)  # paths and what environments say may look like markup
    with used_directory(config) as directory:
        discarded = discarded_before(config)
        with configured(config):
            console.print(f"training {config.env} in {directory}")
            summary = run_command(_train(config, console, discarded))
        if config.agent == "r2d2" and summary["exit_reason"] in COMPLETED and config.eval_episodes:
            summary = _evaluated(config, console, summary)
    _tell(console, directory, summary)
    return 0


def _evaluated(config: TrainConfig, console: Console, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with `eval_return`; as it was, with a line that says why, when that cannot be had."""
    from services.commands.evaluate import played_returns  # brings torch

    console.print(f"playing {config.eval_episodes} episodes with the trained policy (Ctrl-C skips them)")
    playing = EvalConfig.model_validate(
        {"run_dir": config.directory, "episodes": config.eval_episodes, "device": config.device}
    )
    try:
        _, returns = played_returns(playing)
    except KeyboardInterrupt:
        console.print("evaluation skipped")
    except SeedrlError as error:
        console.print(f"evaluation failed: {error}", soft_wrap=True, highlight=False)
    else:
        summary = {**summary, "eval_return": fmean(returns), "eval_episodes": len(returns)}
        save_summary(config, summary)
    return summary


def _tell(console: Console, directory: Path, summary: dict[str, Any]) -> None:
    returns, played = summary["mean_return_100"], summary.get("eval_return")
    console.print(
        f"{summary['exit_reason']}: {summary['steps']:,} steps in {summary['seconds']:,.0f} s "
        f"({summary['steps_per_second']:,.0f} steps/s), "
        f"mean_return_100 {'–' if returns is None else f'{returns:.2f}'}"
        f"{'' if played is None else f', eval_return {played:.2f}'}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"curves:      tensorboard --logdir {directory / 'tensorboard'}", soft_wrap=True)
    if (directory / CHECKPOINTS).is_dir():
        console.print(f"checkpoints: {directory / CHECKPOINTS}   (seedrl eval {directory})", soft_wrap=True)
    console.print(f"summary:     {directory / SUMMARY_FILE}", soft_wrap=True)


async def _train(config: TrainConfig, console: Console, discarded: int) -> dict[str, Any]:
    """Runs it to its end and leaves a summary, also when a service fails for good."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    queue, board, replay = None, None, None
    try:
        async with (
            nats_of_run(config) as nats,
            connected_bus(
                nats, run_id=config.run_id, name="supervisor", patient=config.nats_url is None
            ) as bus,
        ):
            run = LocalRun(config, nats)
            with published_connection(config.directory, run.connection):
                async with (
                    watched_statuses(bus) as board,
                    watched_actors(lambda: run.actor_addresses) as actors,
                    _shown(console, config, run, board, actors),
                ):
                    try:
                        finished = await run.until_done(stop)
                    finally:
                        discarded += board.total("inference", "discarded_steps")
                        replay = replay_counts(board.newest("replay"))
                        with contextlib.suppress(ConnectionFailed):
                            queue = await untrained_queue(bus, config.directory)
    except SeedrlError as error:
        if board is not None:  # the services were started
            reason = f"failed: {error}"
            write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)
        raise
    reason = str(board.newest("learner").get("exit_reason") if finished else "interrupted")
    return write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)


@contextlib.asynccontextmanager
async def _shown(
    console: Console, config: TrainConfig, run: LocalRun, board: StatusBoard, actors: ActorWatch
) -> AsyncIterator[None]:
    """Shows a live table on a terminal, else a line now and then."""
    settings = shlex.quote(str(config.directory / CONFIG_FILE))
    join = f"seedrl actor {config.env} --preset {settings} --inference-url {run.inference_url}"
    console.print(f"another actor: {join}", soft_wrap=True, highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            async with _repeated(lambda: live.update(_table(config, run, board, actors)), TABLE_SECONDS):
                yield
    else:

        def show() -> None:
            console.print(_line(config, board, actors), soft_wrap=True)

        async with _repeated(show, PLAIN_LINE_SECONDS):
            yield


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


def _line(config: TrainConfig, board: StatusBoard, actors: ActorWatch) -> str:
    learner, inference = board.newest("learner"), board.newest("inference")
    trouble = actors_in_trouble(inference.get("actors") or {}, actors.accounts, time.monotonic())
    if not learner.get("steps"):
        replay = [("replay", board.newest("replay"))] if config.agent == "r2d2" else []
        waiting = [
            f"{name}: {doing(name, status)}"
            for name, status in (("inference", inference), *replay, ("learner", learner))
        ]
        return "; ".join([*trouble, *waiting])
    parts = [headline(learner, total_steps=config.total_steps), bottleneck(learner, figures=False), *trouble]
    return "  ".join(part for part in parts if part)


def _table(config: TrainConfig, run: LocalRun, board: StatusBoard, actors: ActorWatch) -> Group:
    connected, now = board.newest("inference").get("actors") or {}, time.monotonic()
    rows = [
        {
            "service": name,
            "state": service.state,
            "restarts": service.restarts,
            "doing": actor_doing(connected.get(name), actors.accounts[name], now)
            if name in actors.accounts
            else doing(name, board.newest(name)),
        }
        for name, service in run.services.items()
    ]
    learner = board.newest("learner")
    title = headline(learner, total_steps=config.total_steps)
    return Group(services_table(rows, title=title), Text(bottleneck(learner, figures=True)))
