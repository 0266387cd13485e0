"""`seedrl eval`: plays episodes with a checkpoint through a real inference service."""

import asyncio
import contextlib
import itertools
import os
import secrets
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch

from services.actor.environments import check_env
from services.commands.config import EvalConfig
from services.local.config import CONFIG_FILE, saved_env
from services.local.process import ChildProcess, seedrl
from services.local.reading import is_file
from services.local.supervisor import SupervisedService
from services.nats_server import embedded_nats
from shared.addresses import free_port, joined
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.episodes import EpisodeConsumer
from shared.bus.key_values import create_spec
from shared.bus.weights import publish_weights
from shared.checkpoints import Checkpoint, checkpoint_at, is_checkpoint, weights_to_bytes
from shared.config import NatsSettings
from shared.errors import RunError
from shared.policy import Policy
from shared.runtime import run_command

TERMINAL_SECONDS = 5.0
PLAIN_SECONDS = 60.0  # where a file may take what is said

Episode = dict[str, Any]


class Telling(NamedTuple):
    """Who is told how far an evaluation is, and how often."""

    say: Callable[[str], object]
    seconds: float


class Played(NamedTuple):
    """What was played: less than was asked for, where the time was up."""

    checkpoint: str  # its name
    returns: list[float]  # raw, of the episodes that ended
    missing: int  # episodes that did not

    def shortfall(self, seconds: float) -> str:
        """That `seconds` were not enough, in words."""
        asked = len(self.returns) + self.missing
        return (
            f"only {len(self.returns)} of {asked} episodes ended in {seconds:g} s, {self.missing} are missing"
        )


class EpisodeShares:
    """Takes the same number of episodes from each environment, so that short ones are not favoured."""

    def __init__(self, *, episodes: int, environments: int) -> None:
        share, rest = divmod(episodes, environments)
        self._shares = [share + (row < rest) for row in range(environments)]
        self._taken: Counter[int] = Counter()
        self.episodes: list[Episode] = []

    def take(self, episodes: Iterable[Episode]) -> None:
        """Takes each episode whose environment's share is not played yet."""
        for episode in episodes:
            row = int(episode["row"])
            if self._taken[row] < self._shares[row]:
                self._taken[row] += 1
                self.episodes.append(episode)

    @property
    def complete(self) -> bool:
        """Whether every share is played."""
        return len(self.episodes) == sum(self._shares)


def evaluate(config: EvalConfig) -> int:
    """Plays the episodes and prints mean, median and deviation of their raw returns.

    Raises RunError when not all of them ended in time, after the figures of those that did.
    """
    played = played_returns(config, telling(_say_aside, is_terminal=sys.stderr.isatty()))
    if played.returns:
        _print(played, as_json=config.as_json)
    if played.missing:
        raise RunError(f"{played.shortfall(config.timeout)}; --timeout gives them more time")
    return 0


def _print(played: Played, *, as_json: bool) -> None:
    returns = played.returns
    result = {
        "checkpoint": played.checkpoint,
        "episodes": len(returns),
        "mean": statistics.fmean(returns),
        "median": statistics.median(returns),
        "deviation": statistics.pstdev(returns),
        "returns": returns,
    }
    if as_json:
        print(orjson.dumps(result).decode())
    else:
        print(
            f"{result['checkpoint']}: {result['episodes']} episodes, mean {result['mean']:.2f}, "
            f"median {result['median']:.2f}, deviation {result['deviation']:.2f}"
        )


def telling(say: Callable[[str], object], *, is_terminal: bool) -> Telling:
    """Every few seconds on a terminal, else now and then."""
    return Telling(say, TERMINAL_SECONDS if is_terminal else PLAIN_SECONDS)


def _say_aside(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


def played_returns(config: EvalConfig, progress: Telling) -> Played:
    """The raw returns of what was played within `config.timeout`. Raises RunError."""
    directory, checkpoint = _run_directory(config.run_dir), checkpoint_at(config.run_dir)
    Policy(checkpoint, device=torch.device("cpu"))  # inference would wait for weights that fit for ever
    config = config.model_copy(update={"run_dir": directory})
    check_env(saved_env(config.run_dir))  # the training may have had another working directory
    episodes = run_command(_played(config, checkpoint, progress))
    returns = [float(episode["return"]) for episode in episodes]
    return Played(checkpoint.path.name, returns, config.episodes - len(returns))


def _run_directory(path: Path) -> Path:
    """The directory of a run, which `path` is or which holds the checkpoint `path`."""
    path = Path(os.path.abspath(path))  # which follows no links: `checkpoints` may lie on another disk
    directory = path.parents[1] if is_checkpoint(path) else path
    if not is_file(directory / CONFIG_FILE):
        raise RunError(f"{directory} is no run's directory ({CONFIG_FILE} is missing)")
    return directory


async def _played(config: EvalConfig, checkpoint: Checkpoint, progress: Telling) -> list[Episode]:
    run_id = f"eval-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="seedrl-eval-") as scratch:
        async with embedded_nats(Path(scratch) / "nats") as server:
            nats = server.settings
            async with (
                connected_bus(nats, run_id=run_id, name="eval", patient=False) as bus,
                beside(server.stays()),
            ):
                await create_spec(bus, checkpoint.spec)
                await publish_weights(
                    bus,
                    weights_to_bytes(checkpoint.weights),
                    update=int(checkpoint.counters["updates"]),
                    network_hash=checkpoint.spec.network_hash,
                )
                players = _players(config, nats, run_id, Path(scratch))
                return await _episodes(config, bus, players, progress)


def _players(config: EvalConfig, nats: NatsSettings, run_id: str, logs: Path) -> list[SupervisedService]:
    """An inference service and one actor of the run's own configuration, but for what is of the training."""
    env = saved_env(config.run_dir)
    common = ["--preset", str(config.run_dir / CONFIG_FILE), "--run-id", run_id, "--log-format", "json"]
    host, port = "127.0.0.1", free_port()
    assert nats.nats_token is not None
    environment = {"SEEDRL_NATS_TOKEN": nats.nats_token.get_secret_value()}
    where = ("--nats-url", nats.nats_url, "--host", host, "--port", str(port))
    size = min(config.episodes, config.environments)
    room = ("--max-environments", str(2 * size))  # while an actor that died is replaced, for both
    inference = seedrl("inference", *common, *where, *room, "--device", config.device, "--no-cuda-graphs")
    seed = config.seed if config.seed is not None else secrets.randbits(31)
    group = ("--groups", "1", "--group-size", str(size), "--seed", str(seed))
    role = ("--inference-url", joined(host, port), "--role", "eval")
    starts = itertools.count()

    def actor() -> list[str]:
        """Of another name at each start, which decides the seeds too: no episode is played again."""
        return seedrl("actor", env, *common, *role, *group, "--actor-id", f"eval-{next(starts)}")

    return [
        SupervisedService(
            ChildProcess("inference", lambda: inference, environment=environment, log=logs / "inference.log")
        ),
        SupervisedService(ChildProcess("actor", actor, environment={}, log=logs / "actor.log")),
    ]


async def _episodes(
    config: EvalConfig, bus: Bus, players: list[SupervisedService], progress: Telling
) -> list[Episode]:
    """Those that ended, all or within `config.timeout`."""
    shares = EpisodeShares(episodes=config.episodes, environments=min(config.episodes, config.environments))
    tasks = [asyncio.create_task(player.run_until_done()) for player in players]
    playing = asyncio.create_task(_gather(bus, shares))
    saying = asyncio.create_task(_tell(shares, config.episodes, progress))
    try:
        async with asyncio.timeout(config.timeout):
            await asyncio.wait({playing, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not playing.done():
                    task.result()
                    raise RunError("a player ended before all episodes were played")
            await playing
    except TimeoutError:
        pass  # what ended meanwhile is worth having
    finally:
        playing.cancel()
        saying.cancel()
        await asyncio.gather(*(player.end(grace_seconds=5.0) for player in reversed(players)))
        await asyncio.gather(*tasks, playing, saying, return_exceptions=True)
    return shares.episodes


async def _tell(shares: EpisodeShares, episodes: int, progress: Telling) -> None:
    while True:
        await asyncio.sleep(progress.seconds)
        progress.say(f"{len(shares.episodes)} of {episodes} episodes have ended")


async def _gather(bus: Bus, shares: EpisodeShares) -> None:
    consumer = EpisodeConsumer(bus)
    while not shares.complete:
        shares.take(await consumer.fetch(timeout=1.0))
