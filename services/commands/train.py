"""`seedrl train`: NATS, the supervisor, the display and the summary around one local run."""

import asyncio
import contextlib
import shlex
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from services.actor.environments import check_env
from services.commands.config import EvalConfig
from services.commands.output import Output
from services.commands.showing import shown
from services.learner.accounts import CHECKPOINTS, COMPLETED, completed, load_accounts
from services.local.config import TrainConfig
from services.local.connection import published_connection
from services.local.directory import configured, used_directory
from services.local.nats import nats_of_run
from services.local.run import LocalRun
from services.local.summary import (
    SUMMARY_FILE,
    discarded_before,
    replay_at_last,
    save_summary,
    untrained_queue,
    write_summary,
)
from services.local.watching import watched_actors
from shared.bus.connection import connected_bus
from shared.bus.key_values import keep_paused
from shared.bus.statuses import StatusBoard, watched_statuses
from shared.config import secret_values
from shared.errors import ConnectionFailed, SeedrlError
from shared.runtime import run_command, stop_signals
from shared.telemetry import configure_logging

BUILT_IN = frozenset({"auto", "mlp", "nature", "impala_shallow", "impala_deep"})
"""Names of networks that need no look at the networks themselves, which bring torch."""


def train(config: TrainConfig) -> int:
    """Runs a whole training; returns the exit status."""
    configure_logging(config.log_level, config.log_format, "supervisor", secrets=secret_values(config))
    if config.network not in BUILT_IN:
        from shared.networks.build import check_network_name  # torch, which nothing else here needs

        check_network_name(config.network)
    check_env(config.env)
    output: Any = Output()
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
    playing = shlex.join(["seedrl", "eval", str(config.directory)])
    say = partial(console.print, soft_wrap=True, highlight=False)
    if not summary["episodes"]:
        say(f"no evaluation: no episode ended in the training, so none may end in it; {playing} plays it")
        return summary
    say(f"playing {config.eval_episodes} episodes with the trained policy (Ctrl-C skips them)")
    asked = EvalConfig.model_validate(
        {
            "run_dir": config.directory,
            "episodes": config.eval_episodes,
            "device": config.device,
            "seed": config.seed,
        }
    )
    try:
        from services.commands.evaluate import played_returns, telling  # bring torch

        played = played_returns(asked, telling(say, is_terminal=console.is_terminal))
    except KeyboardInterrupt:
        say("evaluation skipped")
        return summary
    except SeedrlError as error:
        say(f"evaluation failed: {error}")
        return summary
    if played.missing:  # the mean of those that ended would be that of the short ones
        say(f"evaluation failed: {played.shortfall(asked.timeout)}; {playing} --timeout SECONDS plays longer")
        return summary
    summary = {**summary, "eval_return": fmean(played.returns), "eval_episodes": len(played.returns)}
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
    if not summary["updates"]:
        console.print(f"nothing was trained; logs: {directory / 'logs'}", soft_wrap=True)
        return
    curves = shlex.join(["tensorboard", "--logdir", str(directory / "tensorboard")])
    console.print(f"curves:      {curves}", soft_wrap=True)
    if (directory / CHECKPOINTS).is_dir():
        playing = shlex.join(["seedrl", "eval", str(directory)])
        console.print(f"checkpoints: {directory / CHECKPOINTS}   ({playing})", soft_wrap=True)
    console.print(f"summary:     {directory / SUMMARY_FILE}", soft_wrap=True)


async def _train(config: TrainConfig, console: Console, discarded_so_far: int | None) -> dict[str, Any]:
    """Runs it to its end and leaves a summary, also when a service fails for good."""
    stop = asyncio.Event()
    queue, run, replay, discarded, board = None, None, None, None, StatusBoard()

    def interrupted() -> None:
        is_first = not stop.is_set()
        stop.set()
        if run is not None and is_first:
            console.print(_stopping(config))
        elif run is not None:
            run.kill()

    def inference_waits_for() -> list[str]:
        return [str(reason) for status in board.live("inference") for reason in status["waiting"]]

    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, interrupted)
    try:
        async with (
            nats_of_run(config, inference_waits_for) as nats,
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
                    shown(console, run, board, actors),
                ):
                    try:
                        finished = await run.until_done(stop)
                    finally:
                        with contextlib.suppress(ConnectionFailed):  # once NATS answers, last words are here
                            queue = await untrained_queue(bus, config)
                            if discarded_so_far is not None:
                                discarded = discarded_so_far + board.total("inference", "discarded_steps")
                        replay = replay_at_last(config)
    except Exception as error:
        if run is not None:  # the services were started
            reason = f"failed: {error}"
            write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)
        raise
    reason = _exit_reason(config, board) if finished else "interrupted"
    return write_summary(config, queue=queue, replay=replay, discarded_steps=discarded, exit_reason=reason)


def _stopping(config: TrainConfig) -> str:
    """What Ctrl-C brings about; the learner's journal knows of updates before its status does."""
    updates = load_accounts(config.directory).updates
    saved = "what was learned is saved" if updates else "nothing was trained yet"
    return f"stopping: {saved}; another Ctrl-C ends all at once"


def _exit_reason(config: TrainConfig, board: StatusBoard) -> str:
    """Why the learner ended; where NATS did not bring its last word, what its accounts say."""
    if said := board.newest("learner").get("exit_reason"):
        return str(said)
    accounts = load_accounts(config.directory)
    return completed(accounts, total_steps=config.total_steps, max_seconds=config.max_seconds) or "stopped"
