"""The streams and buckets of a run, created by whoever comes first; knows nothing of what lies in them."""

from typing import Any

import orjson
from nats.js import api
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError
from nats.js.kv import KeyValue

from shared.bus.connection import API_TIMEOUT_SECONDS, Bus
from shared.bus.trouble import QUEUE_IS_FULL, STREAM_NAME_IN_USE, refusal, trouble, words
from shared.errors import ConnectionFailed, QueueFull

MAX_EPISODE_MESSAGES = 10_000
_KEPT_WEIGHTS = 2


class NoStream(ConnectionFailed):
    """Nobody keeps what is published: the stream does not exist, or not now."""


async def published(bus: Bus, subject: str, data: bytes, *, what: str, message_id: str | None = None) -> int:
    """Publishes into the stream of `subject`; the sequence there, once the server has it.

    Raises QueueFull where the stream takes no more for now, NoStream where there is none, and another
    ConnectionFailed when it cannot be told whether the message arrived; all begin with `what`. One that is
    published again with its `message_id` is not kept twice.
    """
    headers = {api.Header.MSG_ID.value: message_id} if message_id is not None else None
    with trouble(what):
        try:
            kept = await bus.js.publish(subject, data, headers=headers)
        except NoStreamResponseError as error:
            raise NoStream(f"{what}: {words(error)}") from error
        except APIError as error:
            if error.err_code == QUEUE_IS_FULL:
                raise QueueFull(f"{what} is full") from error
            raise ConnectionFailed(f"{what}: {words(error)}") from error
    return int(kept.seq)


async def ensure_run(bus: Bus) -> None:
    """Creates what every service of the run may rely on: weights, episodes and the bucket.

    Any number of callers, in any order. A patient bus tries until it works; otherwise ConnectionFailed.
    """

    async def ensure() -> None:
        await ensure_stream(bus, _weights_config(bus))
        await ensure_stream(bus, _episodes_config(bus))
        await run_bucket(bus)

    await bus.persistently(ensure)


async def ensure_stream(bus: Bus, config: api.StreamConfig) -> bool:
    """Creates the stream; False when there is one of this name that is configured otherwise."""
    what = f"stream {config.name}"
    with trouble(what), refusal(what):
        try:
            await bus.js.add_stream(config)
        except BadRequestError as error:
            if error.err_code != STREAM_NAME_IN_USE:
                raise
            return False
    return True


async def stream_info(bus: Bus, stream: str) -> api.StreamInfo | None:
    """Configuration and state of a stream; None when there is none."""
    with trouble(f"stream {stream}"):
        try:
            return await bus.js.stream_info(stream)
        except NotFoundError:
            return None


async def stream_details(bus: Bus, stream: str) -> dict[str, Any] | None:
    """The state of a stream with the sequences that were removed from its middle; None: no stream.

    Raises ConnectionFailed.
    """
    with trouble(f"stream {stream}"):
        answer = await bus.nc.request(
            f"$JS.API.STREAM.INFO.{stream}", b'{"deleted_details": true}', timeout=API_TIMEOUT_SECONDS
        )
    said = orjson.loads(answer.data)
    if (error := said.get("error")) and error.get("code") != 404:
        raise ConnectionFailed(f"stream {stream}: {error.get('description', error)}")
    state: dict[str, Any] | None = said.get("state")
    return state


async def run_bucket(bus: Bus) -> KeyValue:
    """The bucket of what the run agreed on; created where there is none."""
    bucket = bus.subjects.bucket
    with trouble(f"bucket {bucket}"), refusal(f"bucket {bucket}"):
        return await bus.js.create_key_value(
            api.KeyValueConfig(bucket=bucket, storage=api.StorageType.FILE, direct=False)
        )


def _weights_config(bus: Bus) -> api.StreamConfig:
    return api.StreamConfig(
        name=bus.subjects.weights_stream,
        subjects=[bus.subjects.weights],
        storage=api.StorageType.FILE,
        # Two of each part: who reads the newest set is not disturbed while the next one is published.
        max_msgs_per_subject=_KEPT_WEIGHTS,
        allow_direct=True,  # parts travel as they are; the plain API would send them as base64 in JSON
    )


def _episodes_config(bus: Bus) -> api.StreamConfig:
    return api.StreamConfig(
        name=bus.subjects.episodes_stream,
        subjects=[bus.subjects.episodes],
        storage=api.StorageType.FILE,
        max_msgs=MAX_EPISODE_MESSAGES,
        discard=api.DiscardPolicy.OLD,
    )
