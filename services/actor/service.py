"""The actor service: its environments, its connection and its groups, put together."""

import asyncio
import contextlib
import functools
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from services.actor.config import ActorConfig
from services.actor.environments import GroupMaker
from services.actor.group import Group
from services.actor.metrics import ActorMetrics
from services.actor.restarting import EnvironmentHangs
from services.actor.stepping import SteppedGroup
from services.actor.stream import connected
from services.actor.threads import StepThreads
from shared.activity import Activity
from shared.http import new_registry, serving_http
from shared.runtime import run_until_stopped
from shared.telemetry import Progress, get_logger

_CLOSE_SECONDS = 1.0
_BEAT_SECONDS = 0.5

log = get_logger(__name__)


async def run(config: ActorConfig, *, stop: asyncio.Event) -> None:
    """Steps environments until `stop` is set, which the end of the run does, too.

    Raises UnsupportedEnvironment, Refused, EnvironmentCrashed or EnvironmentHangs, in an ExceptionGroup.
    """
    registry = new_registry()
    with StepThreads(config.step_threads) as threads:
        actor = _Actor(config, ActorMetrics(registry), threads)
        registry.register(actor.activity)
        async with serving_http(
            config,
            service="actor",
            is_ready=actor.waiting_for,
            status=actor.status,
            registry=registry,
            progress=actor.progress,
        ):
            await run_until_stopped(actor.play(stop), actor.watch(), stop=stop)


class _Actor:
    """What the parts of one actor process share."""

    def __init__(self, config: ActorConfig, metrics: ActorMetrics, threads: StepThreads) -> None:
        self._config = config
        self._metrics = metrics
        self._threads = threads
        self._groups: list[Group] = []
        self.activity = Activity(
            "actor",
            lambda: metrics.stepping.seconds() / config.step_threads,
            lambda: metrics.sending.seconds() / config.groups,
        )
        self.progress = Progress()

    def waiting_for(self) -> list[str]:
        """What is awaited before all groups step; empty when they do."""
        if not self._groups:
            return ["the environments to be made"]
        return list(
            dict.fromkeys(group.state.waiting_for for group in self._groups if not group.state.connected)
        )

    def status(self) -> dict[str, Any]:
        """What `/status` tells."""
        config = self._config
        last = max((group.state for group in self._groups), key=lambda state: state.crashed_at, default=None)
        return {
            "actor_id": config.actor_id,
            "run_id": config.run_id,
            "env": config.env,
            "role": config.role,
            "inference": config.inference_url,
            "environments": config.groups * config.group_size,
            "steps": sum(group.state.steps for group in self._groups),
            "waiting_for": self.waiting_for(),
            "making_environments": not self._groups,
            "replaced_environments": sum(group.state.replaced for group in self._groups),
            "last_crash": last.last_crash if last is not None else "",
            "activity": self.activity.shares(),
            "groups": [asdict(group.state) for group in self._groups],
        }

    async def play(self, stop: asyncio.Event) -> None:
        """Steps all groups; sets `stop` as soon as one of them hears that the run is over."""
        config = self._config
        async with self._made() as environments, connected(config.inference_url, config.tls_ca) as stub:
            self._groups = [
                Group(
                    self._config,
                    index=index,
                    environments=each,
                    stub=stub,
                    threads=self._threads,
                    metrics=self._metrics,
                )
                for index, each in enumerate(environments)
            ]
            async with asyncio.TaskGroup() as tasks:
                for group in self._groups:
                    tasks.create_task(_until_the_run_is_over(group, stop))

    async def watch(self) -> None:
        """Beats while the step threads come back from their work, or make environment after environment.

        Raises EnvironmentHangs.
        """
        limit = self._config.step_timeout
        while True:
            if self._threads.is_overdue():
                raise EnvironmentHangs(
                    f"{self._config.env} did not finish a step in {limit:g} s (--step-timeout)"
                )
            if self._threads.longest_silence() < 2 * _BEAT_SECONDS:
                self.progress.beat("environments")
            self.activity.sample()
            await asyncio.sleep(_BEAT_SECONDS)

    @contextlib.asynccontextmanager
    async def _made(self) -> AsyncIterator[list[SteppedGroup]]:
        """The groups of environments. Raises UnsupportedEnvironment."""
        made: list[SteppedGroup] = []
        try:
            for index in range(self._config.groups):
                make = functools.partial(_make_group, self._config, index, self._threads.gets_on)
                made.append(await self._threads.run(make, group=index))
            self._metrics.groups.set(len(made))
            log.info(
                "environments made",
                env=self._config.env,
                groups=len(made),
                group_size=self._config.group_size,
            )
            yield made
        finally:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await asyncio.gather(
                        *(self._threads.run(each.close, group=index) for index, each in enumerate(made))
                    )
            except TimeoutError:
                log.warning("environments that are busy or slow to close were left to the end of the process")


async def _until_the_run_is_over(group: Group, stop: asyncio.Event) -> None:
    await group.run()
    if not stop.is_set():
        log.info("the run is over")
    stop.set()


def group_maker(config: ActorConfig, on_made: Callable[[], None] = lambda: None) -> GroupMaker:
    """What makes the groups that `config` asks for."""
    return GroupMaker(
        env=config.env,
        group_size=config.group_size,
        vectorization=config.vectorization,
        env_kwargs=config.env_kwargs,
        life_loss=config.life_loss,
        env_threads=config.env_threads,
        on_made=on_made,
    )


def _make_group(config: ActorConfig, index: int, on_made: Callable[[], None]) -> SteppedGroup:
    maker = group_maker(config, on_made)
    seeds = group_seeds(config.seed, actor_id=config.actor_id, group=index)
    return SteppedGroup(maker, seeds=None if config.seed is None and maker.seeds_itself else seeds)


def group_seeds(seed: int | None, *, actor_id: str, group: int) -> np.random.SeedSequence:
    """Seeds of one group's environments: others for every actor and group, the same for the same `seed`."""
    return np.random.SeedSequence(None if seed is None else (seed, zlib.crc32(actor_id.encode()), group))
