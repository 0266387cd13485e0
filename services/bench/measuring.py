"""A whole training under observation: its counters at the borders of windows, and what lies between.

In a window the pipeline runs and each stage is alone, in turns.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from services.bench.alone import StageAlone
from services.bench.config import PipelineConfig
from services.bench.cpu import children, cpu_seconds
from services.bench.service_process import http_address
from services.bench.stages import Stage, StageTurn
from services.local.config import TrainConfig
from services.local.nats import nats_of_run
from services.local.run import LocalRun
from shared.errors import RunError

Bound = Callable[[dict[Stage, float]], float]  # of the seconds per step of each stage alone
Samples = dict[tuple[str, str], float]  # (sample's name, its label's value or "") -> value

_START_SECONDS = 300.0
_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True)
class Measurement:
    """What the windows say: medians over them, but for `waiting`."""

    alone: dict[Stage, float]  # seconds per step
    bound: float  # steps per second
    steps_per_second: float  # while it did not stand still
    efficiency: float  # of the windows' own ratios: the machine's speed varies from one to the next
    windows: list[float]  # steps per second of each
    efficiencies: list[float]  # of each
    waiting: dict[str, float]  # service -> share of all windows' time it waited for input or output
    cpu_seconds_per_step: dict[str, float]  # by service, NATS among them


class Reading(NamedTuple):
    """All counters at one moment."""

    seconds: float
    steps: float  # trained
    busy: dict[str, float]  # service -> seconds in which it did its work
    cpu: dict[str, float]  # service -> CPU seconds


class Window(NamedTuple):
    """What lies between two readings."""

    before: Reading
    after: Reading
    alone: dict[Stage, StageTurn]

    @property
    def seconds(self) -> float:
        """Between the readings."""
        return self.after.seconds - self.before.seconds

    @property
    def steps(self) -> float:
        """That were trained."""
        return self.after.steps - self.before.steps

    @property
    def steps_per_second(self) -> float:
        """Of the time in which the pipeline did not stand still."""
        still = sum(turn.still_seconds for turn in self.alone.values())
        return self.steps / (self.seconds - still)

    @property
    def costs(self) -> dict[Stage, float]:
        """Seconds per step of each stage alone."""
        return {stage: turn.cost_seconds / turn.steps for stage, turn in self.alone.items()}


async def measured(
    config: PipelineConfig, training: TrainConfig, alone: Mapping[Stage, StageAlone], bound: Bound
) -> Measurement:
    """Runs `training`, warms it up and measures `config.windows` windows. Raises RunError."""
    stop = asyncio.Event()
    others = frozenset(children())
    async with nats_of_run(training) as nats, aiohttp.ClientSession() as http:
        run = LocalRun(training, nats)
        services = asyncio.create_task(run.until_done(stop))
        watch = asyncio.create_task(_watched(config, Probe(training, run, http, others), alone))
        try:
            await asyncio.wait({services, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and watch.exception() is not None:
                await asyncio.wait({services}, timeout=_LAST_WORDS_SECONDS)  # they know better what failed
            if services.done():
                await services  # raises what failed
                raise RunError("the training ended before it was measured; give a larger --total-steps")
            return measurement(watch.result(), bound)
        finally:
            watch.cancel()
            stop.set()
            await asyncio.wait({services})
            services.cancelled() or services.exception()  # what was not saved is nobody's loss


async def _watched(config: PipelineConfig, probe: "Probe", alone: Mapping[Stage, StageAlone]) -> list[Window]:
    try:
        async with asyncio.timeout(_START_SECONDS):
            await probe.found()
    except TimeoutError:
        raise RunError(f"the training did not begin within {_START_SECONDS:g} s") from None
    await asyncio.sleep(config.warm_up_seconds)
    return [await _window(config, probe, alone) for _ in range(config.windows)]


async def _window(config: PipelineConfig, probe: "Probe", alone: Mapping[Stage, StageAlone]) -> Window:
    turns: dict[Stage, StageTurn] = {}
    before = await probe.read_after_update()
    for stage, process in alone.items():
        await asyncio.sleep(config.window_seconds / len(alone))
        turns[stage] = await process.turn(beside=probe.processes())
    return Window(before, await probe.read_after_update(), turns)


def measurement(windows: Sequence[Window], bound: Bound) -> Measurement:
    """What the `windows` say together. Raises RunError where nothing was trained in one."""
    if any(window.steps <= 0 for window in windows):
        raise RunError("nothing was trained within a window; give a larger --window-seconds")

    def idle(service: str) -> float:
        # Who is stopped at work seems to work on, and who is stopped while it waits, to wait: by and by that
        # evens out, but not within one window.
        busy = sum(window.after.busy[service] - window.before.busy[service] for window in windows)
        return min(1.0, max(0.0, 1.0 - busy / sum(window.seconds for window in windows)))

    def cpu(service: str) -> float:
        return median(
            (window.after.cpu[service] - window.before.cpu[service]) / window.steps for window in windows
        )

    first = windows[0]
    speeds = [window.steps_per_second for window in windows]
    bounds = [bound(window.costs) for window in windows]
    efficiencies = [speed / most for speed, most in zip(speeds, bounds, strict=True)]
    return Measurement(
        alone={stage: median(window.costs[stage] for window in windows) for stage in first.alone},
        bound=median(bounds),
        steps_per_second=median(speeds),
        efficiency=median(efficiencies),
        windows=speeds,
        efficiencies=efficiencies,
        waiting={service: idle(service) for service in first.before.busy},
        cpu_seconds_per_step={service: cpu(service) for service in first.before.cpu},
    )


class Probe:
    """Reads the counters of a local run's services over HTTP, and their CPU seconds from the kernel."""

    def __init__(
        self, training: TrainConfig, run: LocalRun, http: aiohttp.ClientSession, others: Collection[int]
    ) -> None:
        """`others`: children of this process that have nothing to do with the run."""
        self._others = others
        self._training = training
        self._run = run
        self._http = http
        self._actors = [name for name in run.services if name.startswith("actor")]

    async def found(self) -> None:
        """Waits until every service answers and the first update is done."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            answers = all(http_address(self._log(name)) for name in self._run.services)
            if answers and await self._updates() > 0:
                return

    def processes(self) -> list[int]:
        """The services and their NATS server."""
        return list(self._names())

    async def read_after_update(self) -> Reading:
        """All counters when the next update is done: updates count hundreds of steps at once."""
        updates = newest = await self._updates()
        while newest == updates:
            await asyncio.sleep(_POLL_SECONDS)
            newest = await self._updates()
        return await self._read()

    async def _updates(self) -> float:
        return (await self._samples("learner")).get(("seedrl_learner_updates_total", ""), 0.0)

    async def _read(self) -> Reading:
        learner, inference, *actors = await asyncio.gather(
            *map(self._samples, ("learner", "inference", *self._actors))
        )
        stepping = sum(actor["seedrl_actor_step_seconds_sum", ""] for actor in actors)
        return Reading(
            seconds=time.monotonic(),
            steps=steps_trained(self._training, learner, actors),
            busy={
                "actor": stepping / (len(actors) * self._training.step_threads),
                "inference": inference["seedrl_inference_batch_seconds_sum", ""],
                "learner": learner["seedrl_learner_activity_seconds_total", "work"],
            },
            cpu=self._cpu(),
        )

    def _cpu(self) -> dict[str, float]:
        replay = ("replay",) if self._training.agent == "r2d2" else ()
        used = dict.fromkeys(("actor", "inference", *replay, "learner", "nats"), 0.0)
        for pid, name in self._names().items():
            used[name.partition("-")[0]] += sum(map(cpu_seconds, (pid, *children(pid))))
        return used

    def _names(self) -> dict[int, str]:
        names = {service.process.pid: name for name, service in self._run.services.items()}
        return {pid: names.get(pid, "nats") for pid in children() if pid not in self._others}

    async def _samples(self, service: str) -> Samples:
        try:
            async with self._http.get(f"http://{http_address(self._log(service))}/metrics") as answer:
                text = await answer.text()
        except aiohttp.ClientError as error:
            raise RunError(f"{service} does not answer: {error}") from error
        return {
            (sample.name, next(iter(sample.labels.values()), "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def _log(self, service: str) -> Path:
        return self._training.directory / "logs" / f"{service}.log"


def steps_trained(training: TrainConfig, learner: Samples, actors: Sequence[Samples]) -> float:
    """Environment steps trained, without reset steps; for R2D2 those that the trained sequences stand for."""
    if training.agent == "r2d2":
        steps = sum(actor["seedrl_actor_steps_total", ""] for actor in actors)
        resets = sum(actor["seedrl_actor_reset_steps_total", ""] for actor in actors)
        sequences = learner["seedrl_learner_sequences_total", ""] / training.replay_ratio
        return sequences * training.sequence_length * steps / max(1.0, steps + resets)
    refused = sum(
        value
        for (name, outcome), value in learner.items()
        if name == "seedrl_learner_chunks_total" and outcome.startswith("refused")
    )
    trained = learner["seedrl_learner_chunks_total", "trained"]
    return learner["seedrl_learner_steps_total", ""] * trained / max(1.0, trained + refused)
