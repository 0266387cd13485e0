"""One group's life: stream after stream, and in each Hello, a reset, then steps and actions in turn."""

import asyncio
import functools
import math
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from services.actor import messages
from services.actor.config import ActorConfig
from services.actor.local import LocalOffer, offered
from services.actor.metrics import ActorMetrics
from services.actor.restarting import EnvironmentCrashed
from services.actor.stepping import SteppedGroup, Transition
from services.actor.stream import InferenceStream, StreamEnded, Stub
from services.actor.threads import StepThreads
from shared.errors import ProtocolError, Refused
from shared.telemetry import get_logger
from shared.types import Array
from shared.wire import inference_pb2 as pb

WELCOME_SECONDS = 30.0
SETTLED_SECONDS = 10.0  # a stream whose steps were answered for so long was a success
REJECTED_SECONDS = 30.0  # longest wait after a step that inference rejected: the next will be no better

# Of inference, by --tls-ca: not vouched for, or another's.
_WRONG_CERTIFICATE = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")
_NO_TLS = "WRONG_VERSION_NUMBER"  # what came was no TLS
_CUT_OFF = ("Connection reset by peer", "Socket closed")  # as by a server that expects TLS
_FINAL_FOR_HELLO = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)

T = TypeVar("T")

log = get_logger(__name__)


class StreamLost(Exception):
    """A stream that is to be replaced by a new one; the text says why."""


class StepRejected(StreamLost):
    """Inference ended the stream because of what a step held."""


class Backoff:
    """How long to wait before the next attempt: at first 0.1 s, then twice as long each time, with jitter."""

    def __init__(self, *, first: float = 0.1, longest: float = 2.0) -> None:
        """No wait exceeds `longest` seconds."""
        self._first = first
        self._longest = longest
        self._next = first

    def seconds(self) -> float:
        """Seconds to wait now; the next wait is longer."""
        now, self._next = self._next, min(self._longest, 2 * self._next)
        return now * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next = self._first


@dataclass
class GroupState:
    """What is told about a group."""

    connected: bool = False
    shared_memory: bool = False  # whether observations go through it
    pipes: bool = False  # whether messages do
    waiting_for: str = "environments"
    streams: int = 0  # that were welcomed
    steps: int = 0
    weights_version: int = 0
    replaced: int = 0  # environments that crashed
    last_crash: str = ""
    crashed_at: float = 0.0  # seconds of the epoch


class Group:
    """Steps one group of environments for inference until inference says that the run is over."""

    def __init__(
        self,
        config: ActorConfig,
        *,
        index: int,
        environments: SteppedGroup,
        stub: Stub,
        threads: StepThreads,
        metrics: ActorMetrics,
    ) -> None:
        self._config = config
        self._environments = environments
        self._stub = stub
        self._threads = threads
        self._index = index
        self._metrics = metrics
        self._backoff = Backoff()
        self._rejections = Backoff(longest=REJECTED_SECONDS)
        self._outage: str | None = None  # what was last logged about why there is no stream
        self._was_rejected = False  # that outage was for a step, and may be for the next
        self._said_connected = False  # since then
        self._log = log.bind(group=index, inference=config.inference_url)
        self.state = GroupState(waiting_for=f"inference at {config.inference_url}")

    async def run(self) -> None:
        """Returns when the run is over. Raises Refused and EnvironmentCrashed."""
        while True:
            try:
                await self._one_stream()
            except StepRejected as rejected:
                self._lost(rejected)
                wait = self._rejections.seconds()
            except (StreamLost, ProtocolError) as lost:
                self._lost(lost)
                wait = self._backoff.seconds()
            except EnvironmentCrashed as crashed:
                raise type(crashed)(f"environment {self._config.env} {crashed}") from crashed
            else:
                return
            finally:
                self._disconnected()
            await asyncio.sleep(wait)

    async def _one_stream(self) -> None:
        """Returns when inference ended the stream with OK. Raises StreamLost, ProtocolError or Refused."""
        token = next(iter(self._config.inference_tokens), None)
        async with InferenceStream(self._stub, token=token) as stream:
            stream_id = secrets.token_hex(8)
            with offered(self._config, self._environments.spec, stream_id=stream_id) as local:
                welcome = await self._welcome(stream, stream_id, local.message)
                if welcome is None:
                    return
                local.settle(welcome)
                stream.use(local.pipes)
                self._welcomed(stream_id, local)
                try:
                    await self._alternate(stream, local.leaves)
                except StreamEnded as ended:
                    if ended.code is grpc.StatusCode.INVALID_ARGUMENT:
                        self._metrics.rejected_steps.inc()
                        raise StepRejected(_words(ended)) from ended
                    raise StreamLost(_words(ended)) from ended

    async def _welcome(
        self, stream: InferenceStream, stream_id: str, shared_memory: pb.SharedMemory | None
    ) -> pb.Welcome | None:
        """The answer to Hello; None when the run is over."""
        hello = messages.hello(
            self._config, self._environments.spec, stream_id=stream_id, shared_memory=shared_memory
        )
        try:
            async with asyncio.timeout(WELCOME_SECONDS):
                await stream.send(hello)
                response = await stream.receive()
        except TimeoutError:
            raise StreamLost(f"no answer to Hello in {WELCOME_SECONDS:g} s") from None
        except StreamEnded as ended:
            if ended.code in _FINAL_FOR_HELLO or any(words in ended.details for words in _WRONG_CERTIFICATE):
                raise Refused(
                    f"inference at {self._config.inference_url} refused this actor: {_words(ended)}"
                ) from ended
            words = _hello_words(ended, speaks_tls=self._config.tls_ca is not None)
            raise StreamLost(words) from ended
        if response is None:
            return None
        messages.check_welcome(response, run_id=self._config.run_id)
        return response.welcome

    async def _alternate(self, stream: InferenceStream, shared: Sequence[Array] | None) -> None:
        """Step and actions in turn, until the stream ends with OK; observations go to `shared`, if any."""
        reset = functools.partial(self._environments.reset, into=shared)
        transition = await self._in_thread(reset)
        self._count(transition)
        sequence = 0
        settles_at = time.perf_counter() + SETTLED_SECONDS
        while True:
            if time.perf_counter() >= settles_at and sequence:
                self._settled()
                settles_at = math.inf
            with self._metrics.action_wait:
                with self._metrics.sending:
                    await stream.send(messages.step(sequence, transition))
                response = await stream.receive()
            if response is None:
                return
            action = messages.actions(
                response,
                sequence=sequence,
                group_size=self._environments.size,
                num_actions=self._environments.spec.num_actions,
            )
            self.state.weights_version = response.actions.weights_version
            transition = await self._step(action)
            sequence += 1

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await self._threads.run(function, group=self._index, limit_seconds=self._config.step_timeout)

    async def _step(self, action: NDArray[np.int64]) -> Transition:
        timed = functools.partial(self._timed, action)
        transition, seconds = await self._in_thread(timed)
        self._metrics.step_seconds.observe(seconds)
        self._count(transition)
        return transition

    def _timed(self, action: NDArray[np.int64]) -> tuple[Transition, float]:
        began = time.perf_counter()
        with self._metrics.stepping:
            return self._environments.step(action), time.perf_counter() - began

    def _count(self, transition: Transition) -> None:
        self.state.steps += transition.steps
        if transition.restarts:
            self.state.replaced += transition.restarts
            self.state.last_crash, self.state.crashed_at = self._environments.last_crash, time.time()
        self._metrics.steps.inc(transition.steps)
        self._metrics.reset_steps.inc(transition.reset_steps)
        self._metrics.episodes.inc(transition.episodes)
        self._metrics.environment_restarts.inc(transition.restarts)

    def _welcomed(self, stream_id: str, local: LocalOffer) -> None:
        shared_memory, pipes = local.leaves is not None, local.pipes is not None
        if not self._said_connected:
            self._log.info("connected", stream=stream_id, shared_memory=shared_memory, pipes=pipes)
        self._said_connected = True
        if not self._was_rejected:
            self._outage = None
        if self.state.streams:
            self._metrics.reconnections.inc()
        self.state.streams += 1
        self.state.connected = True
        self.state.shared_memory, self.state.pipes = shared_memory, pipes
        self.state.waiting_for = ""
        self._metrics.groups_connected.inc()

    def _settled(self) -> None:
        """The stream works: what is lost after this is a new outage."""
        self._backoff.reset()
        self._rejections.reset()
        self._outage, self._was_rejected = None, False

    def _disconnected(self) -> None:
        if self.state.connected:
            self.state.connected = self.state.shared_memory = self.state.pipes = False
            self.state.waiting_for = self.state.waiting_for or "its end: the run is over"
            self._metrics.groups_connected.dec()

    def _lost(self, lost: Exception) -> None:
        """Says why there is no stream: once for each kind of reason until there is one, or, where steps are
        rejected, until one has settled.
        """
        self.state.waiting_for = f"inference at {self._config.inference_url} ({lost})"
        self._was_rejected = isinstance(lost, StepRejected)
        kind = str(lost).partition(":")[0]  # the status; its details differ from attempt to attempt
        if kind != self._outage:
            self._outage = kind
            self._said_connected = False
            if self._was_rejected:
                self._log.error("inference rejected a step; trying again", reason=str(lost))
            else:
                self._log.warning("no stream to inference; trying again", reason=str(lost))


def _hello_words(ended: StreamEnded, *, speaks_tls: bool) -> str:
    """Why there is no stream; where one side speaks TLS and the other does not, in words of our own."""
    if _NO_TLS in ended.details:
        return f"{ended.code.name}: it speaks no TLS, which --tls-ca asks for ({ended.details})"
    if not speaks_tls and any(words in ended.details for words in _CUT_OFF):
        return f"{_words(ended)} (perhaps it speaks TLS: --tls-ca)"
    return _words(ended)


def _words(ended: StreamEnded) -> str:
    return f"{ended.code.name}: {ended.details}" if ended.details else ended.code.name
