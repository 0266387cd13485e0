"""`seedrl train`: NATS, the supervisor, the display and the summary around one local run."""

import asyncio
import contextlib
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from services.actor.environments import check_env
from services.commands.config import EvalConfig
from services.learner.accounts import CHECKPOINTS, COMPLETED, completed, load_accounts
from services.learner.replay_counts import replay_counts
from services.local.config import CONFIG_FILE, TrainConfig
from services.local.connection import published_connection
from services.local.directory import configured, used_directory
from services.local.display import (
    actor_doing,
    actors_in_trouble,
    bottleneck,
    connected_actors,
    doing,
    headline,
    progress_line,
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
from shared.bus.key_values import keep_paused
from shared.bus.statuses import StatusBoard, watched_statuses
from shared.config import secret_values
from shared.errors import ConnectionFailed, SeedrlError
from shared.runtime import run_command, stop_signals
from shared.telemetry import configure_logging

PLAIN_LINE_SECONDS = 5.0
TABLE_SECONDS = 0.5
SILENT_SECONDS = 5.0  # services speak each second


class _Output:
    """Standard output, which goes on in silence when it cannot be written any more.

    Nobody may read it, its terminal be closed, its disk full: the run matters more than what is said of it.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout

    def write(self, text: str) -> int:
        """Length of `text`."""
        with self._silence_instead():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        with self._silence_instead():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _silence_instead(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)


def train(config: TrainConfig) -> int:
    """Runs a whole training; returns the exit status."""
    configure_logging(config.log_level, config.log_format, "supervisor", secrets=secret_values(config))
    if ":" in config.network:
        from shared.networks.build import check_network_name  # torch, which nothing else here needs

        check_network_name(config.network)
    check_env(config.env)
    output: Any = _Output()
    console = Console(file=output, markup=False)  # paths and what environments say may look like markup
    with used_directory(config) as directory:
        discarded = discarded_before(config)
        with configured(config):
            console.print(f"training {config.env} in {directory}")
            summary = run_command(_train(config, console, discarded))
        is_complete = summary["exit_reason"] in COMPLETED and summary["updates"]
        if config.agent == "r2d2" and is_complete and config.eval_episodes:
            summary = _evaluated(config, console, summary)
    _tell(console, directory, summary)
    return 0


def _evaluated(config: TrainConfig, console: Console, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with `eval_return`; as it was, with a line that says why, when that cannot be had."""
    from services.commands.evaluate import played_returns  # brings torch

    console.print(f"playing {config.eval_episodes} episodes with the trained policy (Ctrl-C skips them)")
    playing = EvalConfig.model_validate(
        {
            "run_dir": config.directory,
            "episodes": config.eval_episodes,
            "device": config.device,
            "seed": config.seed,
        }
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
        f"({summary['steps_per_second']:,.0f} steps/s), {summary['updates']:,} updates, "
        f"mean_return_100 {'–' if returns is None else f'{returns:.2f}'}"
        f"{'' if played is None else f', eval_return {played:.2f}'}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"curves:      tensorboard --logdir {directory / 'tensorboard'}", soft_wrap=True)
    if (directory / CHECKPOINTS).is_dir():
        console.print(f"checkpoints: {directory / CHECKPOINTS}   (seedrl eval {directory})", soft_wrap=True)
    console.print(f"summary:     {directory / SUMMARY_FILE}", soft_wrap=True)


async def _train(config: TrainConfig, console: Console, discarded_so_far: int | None) -> dict[str, Any]:
    """Runs it to its end and leaves a summary, also when a service fails for good."""
    stop = asyncio.Event()
    queue, run, replay, discarded, board = None, None, None, None, StatusBoard()

    def interrupted() -> None:
        if run is not None and stop.is_set():
            run.kill()
        elif run is not None:
            console.print("stopping: what was learned is saved; another Ctrl-C ends all at once")
        stop.set()

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, interrupted)
    try:
        async with (
            nats_of_run(config) as nats,
            connected_bus(
                nats, run_id=config.run_id, name="supervisor", patient=config.nats_url is None
            ) as bus,
        ):
            if config.resume:  # whoever starts the run again wants it to go on
                with contextlib.suppress(ConnectionFailed):
                    await keep_paused(bus, False)
            run = LocalRun(config, nats, lambda: int(board.newest("learner").get("steps") or 0))
            with published_connection(config.directory, run.connection):
                async with (
                    watched_statuses(bus, board),
                    watched_actors(lambda: run.actor_addresses) as actors,
                    _shown(console, run, board, actors),
                ):
                    try:
                        finished = await run.until_done(stop)
                    finally:
                        with contextlib.suppress(ConnectionFailed):  # once NATS answers, last words are here
                            queue = await untrained_queue(bus, config.directory)
                            if discarded_so_far is not None:
                                discarded = discarded_so_far + board.total("inference", "discarded_steps")
                        replay = replay_counts(board.newest("replay"))
    except Exception as error:
        if run is not None:  # the services were started
            reason = f"failed: {error}"
            write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)
        raise
    reason = _exit_reason(config, board) if finished else "interrupted"
    return write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)


def _exit_reason(config: TrainConfig, board: StatusBoard) -> str:
    """Why the learner ended; where NATS did not bring its last word, what its accounts say."""
    if said := board.newest("learner").get("exit_reason"):
        return str(said)
    accounts = load_accounts(config.directory)
    return completed(accounts, total_steps=config.total_steps, max_seconds=config.max_seconds) or "stopped"


@contextlib.asynccontextmanager
async def _shown(
    console: Console, run: LocalRun, board: StatusBoard, actors: ActorWatch
) -> AsyncIterator[None]:
    """Shows a live table on a terminal, else a line now and then."""
    settings = shlex.quote(str(run.config.directory / CONFIG_FILE))
    join = f"seedrl actor {run.config.env} --preset {settings} --inference-url {run.inference_url}"
    copies = "a copy of that file"
    if run.config.tls_ca is not None:  # which no preset holds
        join += f" --tls-ca {shlex.quote(str(run.config.tls_ca))}"
        copies = "copies of both files"
    console.print(f"another actor: {join}", soft_wrap=True, highlight=False)
    if run.outer_inference_url:
        elsewhere = f"with {copies} and --inference-url {run.outer_inference_url}"
        console.print(f"on another host: the same {elsewhere}", soft_wrap=True, highlight=False)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            async with _repeated(lambda: live.update(_table(run, board, actors)), TABLE_SECONDS):
                yield
    else:

        def show() -> None:
            console.print(_line(run, board, actors), soft_wrap=True)

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


def _statuses(run: LocalRun, board: StatusBoard, now: float) -> dict[str, dict[str, Any]]:
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


def _line(run: LocalRun, board: StatusBoard, actors: ActorWatch) -> str:
    now = time.monotonic()
    statuses = _statuses(run, board, now)
    trouble = [f"{name} {deaths}" for name, deaths in _absences(run, statuses, actors, now).items()]
    trouble += actors_in_trouble(connected_actors(statuses), actors.accounts, now)
    return progress_line(statuses, total_steps=run.config.total_steps, trouble=trouble)


def _table(run: LocalRun, board: StatusBoard, actors: ActorWatch) -> Group:
    now = time.monotonic()
    statuses = _statuses(run, board, now)
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
