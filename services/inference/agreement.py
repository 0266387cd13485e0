"""What the run agreed on, as this service learns it: from the first Hello or from the run's bucket."""

import asyncio
import math
from functools import partial

from services.inference.chunk_publisher import even_parts
from services.inference.config import InferenceConfig
from services.inference.engine import Engine, state_shapes
from services.inference.metrics import InferenceMetrics
from services.inference.model_thread import ModelThread
from services.inference.refusal import Refusal
from services.inference.session import Introduction
from shared.bus.beside import beside
from shared.bus.connection import Bus
from shared.bus.key_values import KEEP_SECONDS, create_spec, keep_spec, wait_for_spec
from shared.bus.work_queue import ensure_queue, has_queue
from shared.errors import ChunkError, ConfigurationError, ConnectionFailed
from shared.networks.build import build_network
from shared.run_spec import check_settings, own_spec
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.telemetry import get_logger
from shared.wire.chunks import StateShapes, rows_per_message

HELLO_SECONDS = 20.0
"""How long a Hello waits, in all, before the actor is told to come again; actors wait 30 s."""

log = get_logger(__name__)


class Agreement:
    """The run's spec and the engine built from it; also how large the work queue must be."""

    def __init__(
        self, config: InferenceConfig, bus: Bus, thread: ModelThread, metrics: InferenceMetrics
    ) -> None:
        self._config = config
        self._bus = bus
        self._thread = thread
        self._metrics = metrics
        self._engine: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        self._proposing = asyncio.Lock()
        self._least_rows: int | None = None  # R, the smallest of any group so far

    @property
    def engine(self) -> Engine | None:
        """None before the run's spec is known."""
        return self._engine.result() if self._engine.done() else None

    async def engine_built(self) -> Engine:
        """Waits for the engine."""
        return await asyncio.shield(self._engine)

    async def settle(self) -> None:
        """Builds the engine once the run has a spec.

        Raises ConfigurationError when this service's own settings are not the run's, or the network cannot
        be built here.
        """
        spec = await wait_for_spec(self._bus)
        check_settings(self._config, spec, service="inference")
        engine = await Engine.built(spec, self._config, thread=self._thread, metrics=self._metrics)
        self._engine.set_result(engine)
        log.info("run spec", network=spec.network.name, network_hash=spec.network_hash, unroll=spec.unroll)

    async def keep(self) -> None:
        """Puts back, for ever, what NATS loses with its store: the run's spec, and how large its queue is.

        Raises ConfigurationError when the run has got another spec since.
        """
        engine = await self.engine_built()
        async with beside(keep_spec(self._bus, engine.spec)):
            while True:
                await asyncio.sleep(KEEP_SECONDS)
                if self._least_rows is not None:
                    size = self._queue_size(self._least_rows)
                    if not await self._bus.persistently(partial(has_queue, self._bus, size)):
                        await ensure_queue(self._bus, size)

    async def join(self, introduction: Introduction) -> tuple[Engine, int]:
        """The engine for a newcomer, and R, the rows of its chunks that fit a message (0 for an eval group).

        The first newcomer's environment becomes the run's. Raises Refusal.
        """
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                return await self._join(introduction)
        except (TimeoutError, ConnectionFailed) as error:
            raise self._unavailable() from error

    async def _join(self, introduction: Introduction) -> tuple[Engine, int]:
        if not self._engine.done():
            async with self._proposing:
                if not self._engine.done():
                    await self._propose(introduction)
        engine = self._engine.result()
        difference = engine.spec.environment.difference(introduction.environment)
        if difference:
            raise Refusal("spaces", difference)
        if introduction.role == "eval":
            return engine, 0
        rows = self._rows(engine.spec, engine.state_shapes, introduction.group_size)
        least = min(even_parts(introduction.group_size, rows))
        if self._least_rows is None or least < self._least_rows:
            await ensure_queue(self._bus, self._queue_size(least))
            self._least_rows = min(least, self._least_rows or least)
        return engine, rows

    async def ensure_queue(self) -> None:
        """Creates the work queue again should the server have lost it; waits through any outage."""
        if self._least_rows is not None:
            await ensure_queue(self._bus, self._queue_size(self._least_rows))

    async def _propose(self, introduction: Introduction) -> None:
        """Makes the newcomer's environment the run's, if the run has none and it can be used."""
        spec = own_spec(self._config, introduction.environment)
        # Without a state first: a network for absurdly large observations is not even built.
        self._rows(spec, (), introduction.group_size)
        try:
            shapes = await in_thread(partial(_built_shapes, spec))
        except ConfigurationError as error:
            log.error("network does not fit", reason=str(error))
            raise Refusal("spaces", str(error)) from error
        self._rows(spec, shapes, introduction.group_size)
        await create_spec(self._bus, spec)
        await self.engine_built()

    def _rows(self, spec: RunSpec, shapes: StateShapes, group_size: int) -> int:
        try:
            return rows_per_message(spec, shapes, group_size, self._bus.max_payload)
        except ChunkError as error:
            raise Refusal("row_size", str(error)) from error

    def _queue_size(self, rows: int) -> int:
        """Messages that hold `max_queued_batches` batches when a message has `rows` rows."""
        return math.ceil(self._config.max_queued_batches * self._config.batch_size / rows) + 1

    def _unavailable(self) -> Refusal:
        return Refusal("unavailable", f"waiting for NATS at {self._bus.address}", status="UNAVAILABLE")


def _built_shapes(spec: RunSpec) -> StateShapes:
    return state_shapes(build_network(spec))
