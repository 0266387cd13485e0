"""The work queue of trajectory messages: bounded, nothing lost, nothing taken twice.

The queue refuses what does not fit (backpressure). Its `last_seq` counts exactly the messages it kept, and
a message leaves it only by its acknowledgement. `max_msgs` is its only limit: together with `max_bytes` the
server acknowledges messages that it did not keep (nats-server issue 4771).
"""

import asyncio
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakValueDictionary

import nats.errors
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError, NotFoundError

from shared.bus.connection import Bus
from shared.bus.pulling import Puller
from shared.bus.streams import ensure_stream, published, run_bucket, stream_details, stream_info
from shared.bus.trouble import refusal, trouble
from shared.errors import ChunkError, ConnectionFailed

ACK_WAIT_SECONDS = 10.0
DUPLICATE_WINDOW_SECONDS = 1800.0
"""How long the server knows an id, which costs it 200 bytes of memory."""
_ACK_SECONDS = 2.0
_SAME_TIME = timedelta(milliseconds=1)  # what the server says in nanoseconds is rounded in two ways
_MAX_MESSAGE_ID = 512
_SIZE_KEY = "queue_max_messages"


@dataclass(frozen=True)
class QueueState:
    """`last_sequence`: messages ever kept; `messages`: those not acknowledged yet."""

    last_sequence: int
    messages: int


async def ensure_queue(bus: Bus, max_messages: int) -> None:
    """Creates the queue, or enlarges it to `max_messages`; never makes it smaller.

    The queue of an older version gets the present duplicate window. Any number of callers at once. A patient
    bus tries until it works; otherwise ConnectionFailed.
    """

    async def ensure() -> None:
        # The bucket holds the largest size anybody asked for; who wrote an older one to the stream sees
        # that afterwards and writes again.
        size = await _largest_size(bus, max_messages)
        while True:
            await _ensure_size(bus, size)
            largest = await _largest_size(bus, size)
            if largest == size:
                return
            size = largest

    await bus.persistently(ensure)


async def has_queue(bus: Bus, max_messages: int) -> bool:
    """Whether there is a queue of this size or a larger one. Raises ConnectionFailed."""
    info = await stream_info(bus, bus.subjects.trajectories_stream)
    return info is not None and (info.config.max_msgs or 0) >= max_messages


async def publish_chunk(bus: Bus, data: bytes, message_id: str) -> int:
    """Puts one message into the queue; returns its sequence once the server has it.

    Raises QueueFull when the queue takes no more for now, ConnectionFailed when it cannot be told whether
    the message arrived, ChunkError when it can never be sent. Call again with the same `message_id` after the
    first two: a message that did arrive within the last half hour (DUPLICATE_WINDOW_SECONDS) is not kept
    twice, and one that was refused is not taken for a duplicate.
    """
    if len(data) > bus.max_payload or len(message_id) > _MAX_MESSAGE_ID:
        raise ChunkError(
            f"message {message_id[:100]} of {len(data):,} bytes; NATS takes {bus.max_payload:,} at most"
        )
    subject = bus.subjects.trajectories
    return await published(bus, subject, data, what="the work queue", message_id=message_id)


async def queue_state(bus: Bus) -> QueueState:
    """What the queue holds now; zeros before it exists. Raises ConnectionFailed."""
    info = await stream_info(bus, bus.subjects.trajectories_stream)
    if info is None:
        return QueueState(0, 0)
    return QueueState(last_sequence=info.state.last_seq, messages=info.state.messages)


async def has_room(bus: Bus) -> bool:
    """Whether the queue would take a message now; it costs less than to send one. Raises
    ConnectionFailed.
    """
    info = await stream_info(bus, bus.subjects.trajectories_stream)
    return info is None or info.state.messages < (info.config.max_msgs or math.inf)


async def still_queued(bus: Bus, sequences: Iterable[int]) -> list[int]:
    """Those of `sequences` that the queue holds: kept, not acknowledged. Raises ConnectionFailed."""
    state = await stream_details(bus, bus.subjects.trajectories_stream)
    if state is None or not state["messages"]:
        return []
    first, last, gone = state["first_seq"], state["last_seq"], set(state.get("deleted", ()))
    return [sequence for sequence in sequences if first <= sequence <= last and sequence not in gone]


class QueueMessage:
    """One message in hand; it stays in the queue until `ack`.

    While it is in hand, the consumer it came from does not return it a second time, even when the server,
    having heard nothing for `ack_wait`, sends it again. Nor does it return another message of the same
    number: where the server lost its store numbers begin at 1 again.
    """

    def __init__(
        self, message: Msg, bus: Bus, puller: Puller, lost: "asyncio.Future[None]", *, was_delivered: bool
    ) -> None:
        """`lost`: done when the connection that `message` came on is. `was_delivered`: to somebody else."""
        metadata = message.metadata
        self.data: bytes = message.data
        self.sequence: int = metadata.sequence.stream
        self.kept_at = metadata.timestamp
        """When the server kept it; with `sequence` it tells the message from all others there ever were."""
        self.redelivered: bool = metadata.num_delivered > 1 or was_delivered
        self._reply = message.reply
        self._bus = bus
        self._puller = puller
        self._lost = lost
        self._given_back = False
        self._is_acknowledged = False

    async def ack(self) -> None:
        """Takes the message out of the queue; returns once the server has done so.

        A patient bus tries until it works; otherwise ConnectionFailed. A second time does no harm.
        """
        if self._is_acknowledged:
            return

        async def confirm() -> None:
            with trouble(f"acknowledgement of message {self.sequence}"):
                # A server that was away may have lost its store, and give the number to another message.
                if self._lost.done() and not await self._is_kept():
                    return
                try:
                    await self._bus.nc.request(self._reply, Msg.Ack.Ack, timeout=_ACK_SECONDS)
                except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
                    # A consumer that was lost, and made again, knows nothing of what it had delivered.
                    self._puller.doubt()
                    if await self._is_kept():
                        await self._remove()

        await self._bus.persistently(confirm)
        self._is_acknowledged = True

    async def nak(self) -> None:
        """Gives the message back: it is delivered again at once, not after `ack_wait`. Best effort."""
        self._given_back = True
        await self._said(Msg.Ack.Nak)

    async def in_progress(self) -> None:
        """Starts `ack_wait` anew. Best effort: without a connection, nothing happens."""
        await self._said(Msg.Ack.Progress)

    async def is_in_place_of(self, newer: Msg) -> bool:
        """Whether `newer`, of the same number, is not to be taken; False if whoever had this gave it back.

        The same message is taken over; another comes again after `ack_wait`, when this is out of the way.
        """
        if self._given_back:
            return False
        if newer.metadata.timestamp != self.kept_at:
            return True
        self._reply = newer.reply
        if self._is_acknowledged:  # a server that was killed may forget what it confirmed
            await self._said(Msg.Ack.Ack)
        return True

    async def _said(self, word: bytes) -> None:
        with suppress(nats.errors.Error):
            await self._bus.nc.publish(self._reply, word)

    async def _remove(self) -> None:
        """Takes it out of the queue without its consumer. Raises ConnectionFailed."""
        try:
            await self._bus.js.delete_msg(self._bus.subjects.trajectories_stream, self.sequence)
        except APIError:  # also where the acknowledgement came through meanwhile, though late
            if await self._is_kept():
                raise

    async def _is_kept(self) -> bool:
        """Whether it is in the queue: it, not another of its number. Raises ConnectionFailed."""
        stream = self._bus.subjects.trajectories_stream
        with trouble(f"message {self.sequence}"):
            try:
                kept = await self._bus.js.get_msg(stream, self.sequence)
            except NotFoundError:
                return False
        return kept.time is not None and abs(kept.time - self.kept_at) < _SAME_TIME


class QueueConsumer:
    """The one consumer of the queue. Survives restarts of the server, and a queue that is not there yet."""

    def __init__(self, bus: Bus, *, ack_wait: float = ACK_WAIT_SECONDS) -> None:
        self._bus = bus
        self._puller = Puller(
            bus,
            bus.subjects.trajectories_stream,
            api.ConsumerConfig(
                durable_name=bus.subjects.trajectories_consumer,
                name=bus.subjects.trajectories_consumer,
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=ack_wait,
                max_ack_pending=-1,  # the stream's own limit bounds it
                max_deliver=-1,
            ),
        )
        self._in_hand: WeakValueDictionary[int, QueueMessage] = WeakValueDictionary()
        self._delivered_before: api.SequenceInfo | None = None  # the last message, to whoever consumed before

    async def take_over(self) -> None:
        """Makes what a consumer that died had in hand come at once, in its order, not after `ack_wait`.

        To be called before the first fetch, by who holds the lease. A patient bus waits through outages;
        otherwise ConnectionFailed.
        """
        self._delivered_before = await self._bus.persistently(self._puller.take_over)

    async def fetch(self, max_messages: int, timeout: float) -> list[QueueMessage]:
        """What waits, at most `max_messages`; where nothing does, the next to come within `timeout` seconds.

        Empty when nothing came in time, for whatever reason; never raises for trouble with the connection.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            lost = self._bus.nc.lost
            messages = await self._puller.fetch(max_messages, timeout)
            fetched = [message for message in messages if not await self._is_in_hand(message)]
            timeout = deadline - asyncio.get_running_loop().time()
            if fetched or timeout <= 0:
                return [self._taken(message, lost) for message in fetched]

    async def _is_in_hand(self, message: Msg) -> bool:
        held = self._in_hand.get(message.metadata.sequence.stream)
        return held is not None and await held.is_in_place_of(message)

    def _taken(self, message: Msg, lost: "asyncio.Future[None]") -> QueueMessage:
        was_delivered = self._was_delivered(message)
        taken = QueueMessage(message, self._bus, self._puller, lost, was_delivered=was_delivered)
        self._in_hand[taken.sequence] = taken
        return taken

    def _was_delivered(self, message: Msg) -> bool:
        """To whoever consumed before. Where the server lost its store, its numbers begin at 1 again."""
        before, metadata = self._delivered_before, message.metadata
        if before is None or before.last_active is None or metadata.sequence.stream > before.stream_seq:
            return False
        return bool(metadata.timestamp <= before.last_active + _SAME_TIME)


async def _ensure_size(bus: Bus, max_messages: int) -> None:
    name = bus.subjects.trajectories_stream
    config = api.StreamConfig(
        name=name,
        subjects=[bus.subjects.trajectories],
        retention=api.RetentionPolicy.WORK_QUEUE,
        discard=api.DiscardPolicy.NEW,
        max_msgs=max_messages,
        storage=api.StorageType.FILE,
        duplicate_window=DUPLICATE_WINDOW_SECONDS,
    )
    if await ensure_stream(bus, config):
        return
    info = await stream_info(bus, name)
    if info is None:
        raise ConnectionFailed(f"stream {name} was removed")
    largest = max(info.config.max_msgs or 0, max_messages)
    window = max(info.config.duplicate_window, DUPLICATE_WINDOW_SECONDS)
    wanted = info.config.evolve(max_msgs=largest, duplicate_window=window)
    if wanted != info.config:
        with trouble(f"stream {name}"), refusal(f"stream {name}"):
            await bus.js.update_stream(wanted)


async def _largest_size(bus: Bus, size: int) -> int:
    """The largest queue size anybody asked for, `size` included."""
    bucket = await run_bucket(bus)
    while True:
        with trouble(f"bucket {bus.subjects.bucket}"), suppress(KeyNotFoundError, KeyWrongLastSequenceError):
            await bucket.create(_SIZE_KEY, b"%d" % size)
            return size
        with trouble(f"bucket {bus.subjects.bucket}"), suppress(KeyNotFoundError, KeyWrongLastSequenceError):
            entry = await bucket.get(_SIZE_KEY)
            known = int(entry.value or b"0")
            if known >= size:
                return known
            await bucket.update(_SIZE_KEY, b"%d" % size, last=entry.revision)
            return size
