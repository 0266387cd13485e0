"""The live streams: who may join, what each waits for, and what is left of one that ends."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from time import monotonic
from typing import Any

from services.inference.assembler import Cut
from services.inference.chunk_publisher import ChunkPublisher
from services.inference.dispatcher import Dispatcher
from services.inference.engine import Engine
from services.inference.group import Group
from services.inference.metrics import InferenceMetrics
from services.inference.refusal import Refusal
from services.inference.session import Introduction
from services.inference.slots import SlotAllocator
from shared.specs import RunSpec
from shared.wire import inference_pb2 as pb
from shared.wire.pipes import Pipes, taken

_REMEMBERED_IDS = 100_000
_MOST_CHUNKS = 2  # unpublished, per environment there may be: more than live streams hold while one joins

OnEpisode = Callable[[dict[str, Any]], None]


class Stream:
    """One group's stream from its Welcome to its end; the gRPC side calls `answer` for every message."""

    def __init__(
        self,
        group: Group,
        spec: RunSpec,
        *,
        rows_per_message: int,
        dispatcher: Dispatcher,
        publisher: ChunkPublisher,
        on_episode: OnEpisode,
        metrics: InferenceMetrics,
        pipes: Pipes | None,
    ) -> None:
        """`pipes`: through which its messages go, if not through gRPC."""
        self.group = group
        self.pipes = pipes
        self.last_step_at: float | None = None  # monotonic
        self.withheld_since: float | None = None
        self._spec = spec
        self._rows_per_message = rows_per_message
        self._dispatcher = dispatcher
        self._publisher = publisher
        self._on_episode = on_episode
        self._metrics = metrics
        self._publishing: asyncio.Task[None] | None = None
        dispatcher.expect(group)

    async def answer(self, data: bytes) -> bytes:
        """The Actions to a Step, both as bytes. Raises Refusal.

        They are withheld while the chunk before the one that just ended is not acknowledged; when the queue
        is full, until that one is, so that nothing is stepped that has to grow old before it is trained.
        """
        group, role = self.group, self.group.introduction.role
        sequence, steps = group.sequence, group.steps
        step, episodes = group.observe(data)
        self.last_step_at = monotonic()
        self._metrics.steps[role].add(group.steps - steps)
        if episodes:
            self._metrics.episodes[role].add(len(episodes))
        for episode in episodes:
            self._on_episode(episode)
        answer = await self._dispatcher.ask(group, step)
        awaited = self._submitted(group.act(answer))  # nothing here holds a chunk while others are awaited
        if awaited is not None and not awaited.done():
            await self._withheld_until(awaited)
        self._dispatcher.expect(group)
        return pb.ActResponse(
            actions=pb.Actions(
                sequence=sequence,
                action=answer.action.astype("<i8", copy=False).tobytes(),
                weights_version=answer.weights_version,
            )
        ).SerializeToString()

    def _submitted(self, cut: Cut | None) -> "asyncio.Task[None] | None":
        """Hands over the chunk that has ended, if one has; returns what is to be awaited then."""
        if cut is None:
            return None
        before = self._publishing
        self._publishing = self._publisher.submit(
            cut, self._spec, rows_per_message=self._rows_per_message, after=before
        )
        return self._publishing if self._publisher.is_full else before

    async def _withheld_until(self, awaited: "asyncio.Task[None]") -> None:
        self.withheld_since = monotonic()
        self._metrics.held.change(held=1)
        try:
            with self._metrics.withheld:
                await asyncio.wait([awaited])
        finally:
            self.withheld_since = None
            self._metrics.held.change(held=-1)


class Streams:
    """Admits groups to the slots there are."""

    def __init__(
        self,
        *,
        max_environments: int,
        publisher: ChunkPublisher,
        on_episode: OnEpisode,
        metrics: InferenceMetrics,
    ) -> None:
        self._slots = SlotAllocator(max_environments)
        self._publisher = publisher
        self._on_episode = on_episode
        self._metrics = metrics
        self._live: dict[str, Stream] = {}
        self._known_ids: OrderedDict[str, None] = OrderedDict()  # the newest; a stream id is used once

    @property
    def live(self) -> Iterable[Stream]:
        """Those connected now."""
        return self._live.values()

    def check(self, introduction: Introduction) -> None:
        """Raises Refusal when the group can never join, or not now."""
        rows, capacity = introduction.group_size, self._slots.capacity
        if introduction.stream_id in self._known_ids:
            raise Refusal(
                "stream_id",
                f"hello.stream_id: {introduction.stream_id} was used before; every stream has its own",
            )
        if rows > capacity:
            raise Refusal(
                "group_size", f"hello.group_size: {rows} environments; this service takes {capacity} at most"
            )
        if rows > self._slots.free:
            raise Refusal(
                "full",
                f"full: {self._slots.free} of {capacity} environments are free, this group has {rows}",
                status="RESOURCE_EXHAUSTED",
            )
        waiting = self._publisher.rows
        if introduction.role == "train" and waiting >= _MOST_CHUNKS * capacity:
            raise Refusal(
                "backlog",
                f"backlog: chunks of {waiting} environments, also of ended streams, wait to be published",
                status="RESOURCE_EXHAUSTED",
            )

    @asynccontextmanager
    async def opened(
        self, introduction: Introduction, engine: Engine, *, rows_per_message: int
    ) -> AsyncIterator[Stream]:
        """A stream with slots of its own, freed on leaving. Raises Refusal as `check`."""
        self.check(introduction)
        slots = self._slots.allocate(introduction.group_size)
        assert slots is not None, "checked"
        with ExitStack() as leaving:
            leaving.callback(self._gauge)
            leaving.callback(self._slots.release, slots)
            group = Group(introduction, spec=engine.spec, slots=slots, frames_in_place=engine.frames_in_place)
            leaving.callback(engine.dispatcher.forget, group)
            pipes = None
            if group.shares_memory:
                pipes = taken(
                    introduction.shared_memory, group_size=group.rows, stream_id=introduction.stream_id
                )
            if pipes is not None:
                leaving.callback(pipes.close)
            stream = Stream(
                group,
                engine.spec,
                rows_per_message=rows_per_message,
                dispatcher=engine.dispatcher,
                publisher=self._publisher,
                on_episode=self._on_episode,
                metrics=self._metrics,
                pipes=pipes,
            )
            self._remember(introduction.stream_id)
            with self._counted(stream):
                yield stream

    @contextmanager
    def _counted(self, stream: Stream) -> Iterator[None]:
        """Within, it is among the live streams; afterwards its unfinished steps count as discarded."""
        stream_id = stream.group.introduction.stream_id
        self._live[stream_id] = stream
        self._metrics.held.change(members=1)
        self._gauge()
        try:
            yield
        finally:
            del self._live[stream_id]
            self._metrics.held.change(members=-1)
            self._metrics.discarded_steps.add(stream.group.unfinished_steps)

    def _remember(self, stream_id: str) -> None:
        self._known_ids[stream_id] = None
        if len(self._known_ids) > _REMEMBERED_IDS:
            self._known_ids.popitem(last=False)

    def _gauge(self) -> None:
        self._metrics.streams.set(len(self._live))
        self._metrics.environments.set(self._slots.capacity - self._slots.free)
