"""Finished episodes on NATS, from inference to the learner and to evaluation; knows not what they hold."""

import secrets
from typing import Any

import nats.errors
import orjson
import structlog
from nats.js import api

from shared.bus.connection import Bus
from shared.bus.pulling import Puller
from shared.bus.streams import NoStream, ensure_run, published

ACK_WAIT_SECONDS = 10.0

log = structlog.get_logger(__name__)

Episode = dict[str, Any]


async def publish_episodes(bus: Bus, episodes: list[Episode], *, message_id: str | None = None) -> None:
    """Publishes episodes, in several messages where one does not hold them; returns when they are kept.

    Raises ConnectionFailed when that cannot be told; call again with the same `message_id` and episodes, and
    none is kept twice.
    """
    message_id = message_id or secrets.token_hex(8)
    for number, data in enumerate(_messages(episodes, bus.max_payload)):
        subject, numbered = bus.subjects.episodes, f"{message_id}/{number}"
        try:
            await published(bus, subject, data, what="episodes", message_id=numbered)
        except NoStream:
            await ensure_run(bus)
            raise


class EpisodeConsumer:
    """The durable consumer of a run's episodes; each is fetched once, also over restarts."""

    def __init__(self, bus: Bus) -> None:
        name = bus.subjects.episodes_consumer
        consumer = api.ConsumerConfig(
            durable_name=name,
            name=name,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_SECONDS,
            max_ack_pending=-1,
        )
        self._puller = Puller(bus, bus.subjects.episodes_stream, consumer)

    async def fetch(self, *, timeout: float, max_messages: int = 100) -> list[Episode]:
        """The episodes of the messages that wait; where none does, of the next within `timeout` seconds.

        They are acknowledged, and will not come again. Empty when nothing came in time, for whatever reason.
        """
        episodes: list[Episode] = []
        for message in await self._puller.fetch(max_messages, timeout):
            try:
                episodes += orjson.loads(message.data)["episodes"]
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                log.error("episodes_unreadable", reason=str(error))
            try:
                await message.ack()
            except nats.errors.Error as error:
                log.warning("episodes_may_come_again", reason=str(error))
        return episodes


def _messages(episodes: list[Episode], max_bytes: int) -> list[bytes]:
    data = orjson.dumps({"episodes": episodes})
    if len(data) <= max_bytes or len(episodes) < 2:
        return [data]
    half = len(episodes) // 2
    return _messages(episodes[:half], max_bytes) + _messages(episodes[half:], max_bytes)
