"""Fetching from a durable consumer: prompt, bounded in time, unharmed by restarts of the server.

nats-py's own fetch waits for a full batch once the first message came late, and may leave a request behind
that catches messages nobody waits for. Here one request serves one fetch, and ends before the fetch does.
"""

import asyncio
import itertools
from contextlib import suppress

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api
from nats.js.errors import NotFoundError

from shared.bus.connection import RETRY_SECONDS, Bus
from shared.bus.trouble import refusal, trouble
from shared.errors import ConnectionFailed

_SERVER_SECONDS = 1.0
"""How much later than a request's end the server's word about it may come."""
_LEAST_SECONDS = 0.01
_MAX_BYTES = 32 * 2**20
"""Of one request's messages; the server cuts the connection of who has 64 MB on the way (its max_pending)."""
_ENVELOPE_BYTES = 2**20  # more than subjects and headers have
_DONE = ("404", "408")  # no more messages; time is up
_ENOUGH_BYTES = "Message Size Exceeds MaxBytes"

_numbers = itertools.count()


class Puller:
    """Pulls from one durable consumer, which it creates; a stream that does not exist yet is waited for."""

    def __init__(self, bus: Bus, stream: str, consumer: api.ConsumerConfig) -> None:
        self._bus = bus
        self._stream = stream
        self._consumer = consumer
        self._next_message = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer.durable_name}"
        self._is_ready = False
        self._inbox: _Inbox | None = None

    async def fetch(self, max_messages: int, timeout: float) -> list[Msg]:
        """What is there, at most `max_messages`; where nothing is, the next that comes within `timeout`.

        Large messages come some at a time, 32 MiB or so. Empty when nothing came in `timeout` seconds,
        whatever the reason: a server that is away, or a stream that does not exist, is tried again within
        the call and in the next.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            try:
                async with asyncio.timeout_at(max(deadline, loop.time() + _LEAST_SECONDS)):
                    await self._bus.connected()
                    await self.ensure()
            except (TimeoutError, ConnectionFailed):
                pass
            else:
                messages = await self._pull(max_messages, max(deadline - loop.time(), _LEAST_SECONDS))
                if messages or self._is_ready:
                    return messages
            remaining = deadline - loop.time()
            if remaining <= 0:
                return []
            await asyncio.sleep(min(RETRY_SECONDS, remaining))

    async def ensure(self) -> None:
        """Creates the consumer unless it is known to be there; raises ConnectionFailed."""
        if self._is_ready:
            return
        what = f"consumer {self._consumer.durable_name}"
        with trouble(what), refusal(what):
            try:
                await self._bus.js.add_consumer(self._stream, self._consumer)
            except NotFoundError as error:
                raise ConnectionFailed(f"{what}: there is no stream {self._stream}") from error
        self._is_ready = True

    async def take_over(self) -> api.SequenceInfo | None:
        """Takes the place of whoever used the consumer before; raises ConnectionFailed.

        What that one had not acknowledged comes again at once, and before anything newer. Returns which was
        the last message that it was given, and when; None where there was nobody.
        """
        what = f"consumer {self._consumer.durable_name}"
        with trouble(what), suppress(NotFoundError):
            info = await self._bus.js.consumer_info(self._stream, self._consumer.durable_name or "")
            await self._bus.js.delete_consumer(self._stream, self._consumer.durable_name or "")
            delivered: api.SequenceInfo | None = info.delivered
            return delivered
        return None

    def doubt(self) -> None:
        """Makes the next use create the consumer again; what is there already stays."""
        self._is_ready = False

    async def _pull(self, max_messages: int, timeout: float) -> list[Msg]:
        """One request from start to end; afterwards, not ready means that it did not end well."""
        messages: list[Msg] = []
        inbox = self._inbox = self._inbox or await _Inbox.opened(self._bus)
        ended_well = False
        try:
            async with asyncio.timeout(timeout + _SERVER_SECONDS):
                ended_well = await inbox.pull(self._next_message, max_messages, timeout, messages)
        except (TimeoutError, ConnectionFailed):
            pass
        except asyncio.CancelledError:
            inbox.put_back(messages)
            raise
        finally:
            if not ended_well:
                # What still comes for this request must not be taken for the next one's.
                self.doubt()
                self._inbox = None
                await inbox.close()
        return messages


class _Inbox:
    """Where one consumer's messages and the server's words about requests arrive."""

    def __init__(self, bus: Bus, subject: str) -> None:
        self._bus = bus
        self._subject = subject
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()  # bounded by the requests' batches
        self._subscription: Subscription | None = None

    @staticmethod
    async def opened(bus: Bus) -> "_Inbox":
        inbox = _Inbox(bus, bus.nc.new_inbox())
        # Limit 0 is none: at its default limits the client drops large messages.
        inbox._subscription = await bus.nc.subscribe(
            f"{inbox._subject}.*", cb=inbox._on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        return inbox

    async def pull(
        self,
        next_message: str,
        max_messages: int,
        timeout: float,
        messages: list[Msg],
    ) -> bool:
        """Appends to `messages` as they come; whether the request ended as it should."""
        reply = f"{self._subject}.{next(_numbers)}"
        # no_wait with expires: what is there at once, else the first to come, and then an end.
        request = {
            "batch": max_messages,
            "no_wait": True,
            "expires": int(timeout * 1e9),
            "max_bytes": max(_MAX_BYTES, self._bus.nc.max_payload + _ENVELOPE_BYTES),
        }
        lost = self._bus.nc.lost
        lost.add_done_callback(self._on_lost)
        try:
            with trouble(next_message):
                await self._bus.nc.publish(next_message, orjson.dumps(request), reply=reply)
            while len(messages) < max_messages:
                message = await self._arrived.get()
                if message is None:
                    return False
                headers = message.headers or {}
                status = headers.get("Status")
                if status is None:
                    messages.append(message)
                elif message.subject == reply:
                    return status in _DONE or headers.get("Description") == _ENOUGH_BYTES
            return True
        finally:
            lost.remove_done_callback(self._on_lost)

    def put_back(self, messages: list[Msg]) -> None:
        """Makes `close` give `messages` back."""
        for message in messages:
            self._arrived.put_nowait(message)

    async def close(self) -> None:
        """Ends the subscription; gives back what arrived and was not taken: it comes again at once.

        What is still on its way nobody can give back: it comes again after the consumer's `ack_wait`.
        """
        with suppress(nats.errors.Error):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            while not self._arrived.empty():
                message = self._arrived.get_nowait()
                if message is not None and message.reply:
                    await message.nak()

    async def _on_message(self, message: Msg) -> None:
        self._arrived.put_nowait(message)

    def _on_lost(self, _: "asyncio.Future[None]") -> None:
        self._arrived.put_nowait(None)
