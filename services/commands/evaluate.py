"""`seedrl eval`: plays episodes with a checkpoint through a real inference service."""

import asyncio
import itertools
import secrets
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import torch

from services.actor.environments import check_env
from services.commands.config import EvalConfig
from services.local.config import CONFIG_FILE, saved_env
from services.local.process import ChildProcess, seedrl
from services.local.supervisor import SupervisedService
from services.nats_server import embedded_nats
from shared.addresses import free_port, joined
from shared.bus.beside import beside
from shared.bus.connection import Bus, connected_bus
from shared.bus.episodes import EpisodeConsumer
from shared.bus.key_values import create_spec
from shared.bus.weights import publish_weights
from shared.checkpoints import Checkpoint, latest_checkpoint, weights_to_bytes
from shared.config import NatsSettings
from shared.errors import RunError
from shared.policy import Policy
from shared.runtime import run_command

Episode = dict[str, Any]


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
    """Plays the episodes and prints mean, median and deviation of their raw returns."""
    checkpoint, returns = played_returns(config)
    result = {
        "checkpoint": checkpoint,
        "episodes": len(returns),
        "mean": statistics.fmean(returns),
        "median": statistics.median(returns),
        "deviation": statistics.pstdev(returns),
        "returns": returns,
    }
    if config.as_json:
        print(orjson.dumps(result).decode())
    else:
        print(
            f"{result['checkpoint']}: {result['episodes']} episodes, mean {result['mean']:.2f}, "
            f"median {result['median']:.2f}, deviation {result['deviation']:.2f}"
        )
    return 0


def played_returns(config: EvalConfig) -> tuple[str, list[float]]:
    """The name of the checkpoint that was played, and the raw return of every episode. Raises RunError."""
    checkpoint = _checkpoint(config.run_dir)
    check_env(saved_env(config.run_dir))  # the training may have had another working directory
    episodes = run_command(_played(config, checkpoint))
    return checkpoint.path.name, [float(episode["return"]) for episode in episodes]


def _checkpoint(run_dir: Path) -> Checkpoint:
    if not (run_dir / CONFIG_FILE).is_file():
        raise RunError(f"{run_dir} is no run's directory ({CONFIG_FILE} is missing)")
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{run_dir} holds no valid checkpoint")
    Policy(checkpoint, device=torch.device("cpu"))  # inference would wait for weights that fit for ever
    return checkpoint


async def _played(config: EvalConfig, checkpoint: Checkpoint) -> list[Episode]:
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
                return await _episodes(config, bus, _players(config, nats, run_id, Path(scratch)))


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


async def _episodes(config: EvalConfig, bus: Bus, players: list[SupervisedService]) -> list[Episode]:
    shares = EpisodeShares(episodes=config.episodes, environments=min(config.episodes, config.environments))
    tasks = [asyncio.create_task(player.run_until_done()) for player in players]
    playing = asyncio.create_task(_gather(bus, shares))
    try:
        async with asyncio.timeout(config.timeout):
            await asyncio.wait({playing, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not playing.done():
                    task.result()
                    raise RunError("a player ended before all episodes were played")
            await playing
    except TimeoutError as error:
        raise RunError(
            f"only {len(shares.episodes)} of {config.episodes} episodes ended in {config.timeout:.0f} s"
        ) from error
    finally:
        playing.cancel()
        await asyncio.gather(*(player.end(grace_seconds=5.0) for player in reversed(players)))
        await asyncio.gather(*tasks, playing, return_exceptions=True)
    return shares.episodes


async def _gather(bus: Bus, shares: EpisodeShares) -> None:
    consumer = EpisodeConsumer(bus)
    while not shares.complete:
        shares.take(await consumer.fetch(timeout=1.0))
