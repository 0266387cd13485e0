"""The inference service: its endpoints, its connections and its tasks, put together."""

import asyncio
import os
import socket
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial

import torch

from services.inference.access import Access
from services.inference.agreement import Agreement
from services.inference.chunk_publisher import ChunkPublisher
from services.inference.config import InferenceConfig
from services.inference.episode_publisher import EpisodePublisher
from services.inference.metrics import InferenceMetrics
from services.inference.model_thread import ModelThread
from services.inference.pause import Pause
from services.inference.refusal import Refusal
from services.inference.server import Health, serving_actors
from services.inference.servicer import InferenceServicer
from services.inference.status import Report
from services.inference.streams import Streams
from services.inference.tls import tls_front
from shared.addresses import is_loopback
from shared.bus.connection import Bus, connected_bus
from shared.bus.control import publish_status, serve_control
from shared.bus.weights import watch_weights
from shared.errors import RunError
from shared.http import new_registry, serving_http
from shared.networks.build import check_network_name
from shared.networks.precision import resolve_device
from shared.runtime import run_until_stopped
from shared.telemetry import Progress, get_logger

SERVICE = "inference"

_LINGER_SECONDS = 3.0  # after `stop`, for actors that are just reconnecting to hear of it
# With Python's own 5 ms the model thread may wait longer for the loop than a batch takes.
_SWITCH_SECONDS = 0.001
_SHARE_OF_GRACE = 0.5  # for publishing what is left; the rest is for closing connections

log = get_logger(__name__)


async def run(config: InferenceConfig, *, stop: asyncio.Event) -> None:
    """Serves the run `config.run_id` until `stop` is set, or until the run is stopped over NATS.

    Raises ConfigurationError for a device, network or address that cannot be used and for settings that are
    not the run's, and Refused when NATS refuses the token; some of them in an ExceptionGroup.
    """
    torch.set_num_threads(config.torch_threads)
    sys.setswitchinterval(_SWITCH_SECONDS)
    resolve_device(config.device)
    check_network_name(config.network)
    progress, metrics = Progress(), InferenceMetrics(new_registry())
    async with (
        connected_bus(config, run_id=config.run_id, name=SERVICE, patient=True) as bus,
        ModelThread(beat=partial(progress.beat, "model")) as thread,
    ):
        agreement = Agreement(config, bus, thread, metrics)
        async with ChunkPublisher(bus, metrics, ensure_queue=agreement.ensure_queue) as publisher:
            service = _Service(config, bus, agreement, publisher, metrics)
            async with serving_http(
                config,
                service=SERVICE,
                is_ready=service.report.not_ready,
                status=service.report.status,
                registry=metrics.registry,
                progress=progress,
            ):
                await service.serve(stop)
                await service.finish()


class _Service:
    """The parts of the service that know of each other."""

    def __init__(
        self,
        config: InferenceConfig,
        bus: Bus,
        agreement: Agreement,
        publisher: ChunkPublisher,
        metrics: InferenceMetrics,
    ) -> None:
        self._config = config
        self._bus = bus
        self._agreement = agreement
        self._publisher = publisher
        self._metrics = metrics
        self._episodes = EpisodePublisher(bus)
        self._streams = Streams(
            max_environments=config.max_environments,
            publisher=publisher,
            on_episode=self._episodes.add,
            metrics=metrics,
        )
        self._access = Access(config.inference_tokens, metrics)
        self._servicer = InferenceServicer(
            agreement,
            self._streams,
            metrics,
            self._access,
            run_id=config.run_id,
            step_timeout=config.step_timeout,
        )
        self._health = Health()
        self._over = asyncio.Event()  # the run was stopped
        self._me = f"{socket.gethostname()}-{os.getpid()}"
        self._pausing = Pause(bus, agreement)
        self.report = Report(bus, agreement, self._streams, publisher, metrics, self._pausing)

    async def serve(self, stop: asyncio.Event) -> None:
        """Serves actors until `stop` is set; then every stream has ended."""
        config = self._config
        handlers = {"pause": self._pause, "resume": self._resume, "stop": self._stop}
        async with AsyncExitStack() as stack:
            front = None
            if config.tls_cert is not None and config.tls_key is not None:
                front = await stack.enter_async_context(
                    tls_front(config.tls_cert, config.tls_key, self._access)
                )
            await stack.enter_async_context(
                serving_actors(config.host, config.port, self._servicer, self._health, front)
            )
            if not config.inference_tokens and not is_loopback(config.host):
                log.warning(
                    "whoever reaches this address may act: no SEEDRL_INFERENCE_TOKEN", host=config.host
                )
            try:
                await run_until_stopped(
                    self._agreement.settle(),
                    self._agreement.keep(),
                    self._pausing.keep(),
                    self._act(),
                    self._publisher.failed(),
                    self._follow_weights(),
                    self._servicer.end_overdue(),
                    self._episodes.run(),
                    self._watch(),
                    self._linger(stop),
                    serve_control(self._bus, SERVICE, self._me, handlers, self.report.status),
                    stop=stop,
                )
            finally:
                self.report.ending = "shutting down"
                self._servicer.close(Refusal("unavailable", "shutting down", status="UNAVAILABLE"))

    async def finish(self) -> None:
        """Publishes what is left, for a share of the grace period, and says so in a last status."""
        seconds = _SHARE_OF_GRACE * self._config.grace_seconds
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, 1.0)):
                await self._episodes.flush()
        await self._publisher.drain(seconds)
        await publish_status(self._bus, SERVICE, self._me, self.report.status())

    async def _act(self) -> None:
        """Ends with what the model raises."""
        engine = await self._agreement.engine_built()
        await engine.dispatcher.failed()

    async def _follow_weights(self) -> None:
        engine = await self._agreement.engine_built()
        await self._pausing.restore()
        async for weights in watch_weights(self._bus, on_trouble=self.report.weights_unread):
            try:
                await engine.load(weights)
            except RunError as error:
                self._metrics.refused_weights.inc()
                self._metrics.weights_refused.set(1)
                self.report.refused_weights = str(error)
                log.error("weights refused", version=weights.version, reason=str(error))
                continue
            self.report.refused_weights = ""
            self._metrics.weights_refused.set(0)
            self._metrics.weights_version.set(weights.version)
            self._metrics.weights_update.set(weights.update)
            log.debug("weights", version=weights.version, update=weights.update)

    async def _watch(self) -> None:
        """Each second: the speed, and what grpc.health.v1 says."""
        while True:
            self.report.sample()
            await self._health.set(serving=not self.report.not_ready())
            await asyncio.sleep(1.0)

    async def _linger(self, stop: asyncio.Event) -> None:
        """After the run was stopped, stays for actors that come back just then, and ends the service."""
        await self._over.wait()
        await asyncio.sleep(_LINGER_SECONDS)
        stop.set()

    async def _pause(self) -> str:
        await self._pausing.tell(is_on=True)
        return "withholds all actions"

    async def _resume(self) -> str:
        await self._pausing.tell(is_on=False)
        return "gives actions again"

    async def _stop(self) -> str:
        self.report.ending = "the run was stopped"
        ended = self._servicer.close(Refusal("unavailable", "the run is over", status="OK"))
        self._over.set()
        if self._pausing.is_on:  # whoever starts the run again wants it to go on
            await self._pausing.tell(is_on=False)
        return f"ended {ended} streams; stops"
