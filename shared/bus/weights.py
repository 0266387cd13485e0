"""Weights on NATS: bytes in parts, and a manifest that names them, published last.

The version of a set is the sequence of its manifest, so it grows with every publication, also when a
learner starts again from an older checkpoint. Knows nothing of networks.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import nats.errors
import orjson
import structlog
from nats.aio.msg import Msg
from nats.js.api import RawStreamMsg
from nats.js.errors import NotFoundError

from shared.bus.connection import RETRY_SECONDS, Bus
from shared.bus.streams import NoStream, ensure_run, published, stream_details
from shared.bus.trouble import trouble
from shared.errors import ConnectionFailed, Refused

WEIGHTS_FORMAT_VERSION = 1
MAX_PART_BYTES = 4 * 2**20
POLL_SECONDS = 1.0
_IN_FLIGHT = 4  # parts on their way at once
_TRIES = 20
_AFTER_WAKING_SECONDS = (0.0, 0.002, 0.01, 0.05)
_HASHED_IN_A_THREAD_BYTES = 2**20

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Weights:
    """One published set; `update` is the learner's update count, `data` what it published."""

    version: int
    update: int
    network_hash: str
    data: bytes


@dataclass(frozen=True)
class _Manifest:
    version: int
    update: int
    network_hash: str
    parts: tuple[int, ...]  # sequences
    sha256: str


async def publish_weights(bus: Bus, data: bytes, *, update: int, network_hash: str) -> int:
    """Publishes one set; returns its version. Raises ConnectionFailed, after which no one sees the set."""
    manifest = {
        "format_version": WEIGHTS_FORMAT_VERSION,
        "update": update,
        "network_hash": network_hash,
        "bytes": len(data),
        "sha256": await _sha256(data),
    }
    try:
        return await _publish_set(bus, data, manifest)
    except NoStream:
        await ensure_run(bus)
        return await _publish_set(bus, data, manifest)


async def has_weights(bus: Bus, version: int) -> bool:
    """Whether NATS still has the set, or a newer one, with all its parts. Raises ConnectionFailed.

    The sequences that a stream gave away say nothing of that: a purge and a damaged store leave them.
    """
    state = await stream_details(bus, bus.subjects.weights_stream)
    manifest = await _newest_manifest(bus) if state is not None else None
    if state is None or manifest is None or manifest.version < version:
        return False
    removed = set(state.get("deleted") or ())
    return all(part >= state["first_seq"] and part not in removed for part in manifest.parts)


class WeightsReader:
    """Reads the newest set. `trouble`: why it could not be read the last time, in words; else empty."""

    def __init__(self, bus: Bus) -> None:
        self.trouble = ""
        self._bus = bus
        self._damaged = 0

    async def newer_than(self, version: int) -> Weights | None:
        """The newest set, or None while that is `version` or there is none. Raises ConnectionFailed.

        Any other version counts as newer: a lower one means that the server lost its store and the
        versions began anew. Raises Refused for a format that this program does not know.
        """
        for _ in range(_TRIES):
            manifest = await _newest_manifest(self._bus)
            if manifest is None or manifest.version == version:
                self.trouble = ""
                return None
            if manifest.version == self._damaged:
                return None
            data = await self._data(manifest)
            if data is None:
                continue  # replaced while it was read; the next manifest comes or is there already
            if await _sha256(data) == manifest.sha256:
                self.trouble = ""
                return Weights(manifest.version, manifest.update, manifest.network_hash, data)
            self._damaged, self.trouble = manifest.version, "those in NATS are damaged"
            log.error("weights_damaged", version=manifest.version)
        self.trouble = "NATS lost parts of them"
        return None

    async def _data(self, manifest: _Manifest) -> bytes | None:
        """The parts joined; None when one of them is gone."""
        pieces: list[bytes] = []
        for sequences in _in_flight(manifest.parts):
            got = await asyncio.gather(*(self._part(sequence) for sequence in sequences))
            pieces += [piece for piece in got if piece is not None]
            if None in got:
                return None
        return b"".join(pieces)

    async def _part(self, sequence: int) -> bytes | None:
        with trouble("weights"):
            try:
                message = await self._bus.js.get_msg(
                    self._bus.subjects.weights_stream, seq=sequence, direct=True
                )
            except NotFoundError:
                return None
        return message.data or b""


async def watch_weights(
    bus: Bus, *, on_trouble: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Weights]:
    """Yields the newest set whenever there is a newer one, sets that were replaced meanwhile left out.

    Wakes with the publication, looks each second in any case, and outlives restarts of the server.
    `on_trouble` hears after each look why it failed, in words; empty: it did not.
    """
    reader = WeightsReader(bus)
    published = asyncio.Event()

    async def wake(_: Msg) -> None:
        published.set()

    await bus.connected()
    subscription = await bus.nc.subscribe(bus.subjects.weights_manifest, cb=wake)
    try:
        version = 0
        while True:
            was_woken = published.is_set()
            published.clear()
            weights = await _newest(bus, reader, version, surely=was_woken)
            on_trouble(reader.trouble)
            if weights is not None:
                version = weights.version
                yield weights
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await published.wait()
    finally:
        with suppress(nats.errors.Error):
            await subscription.unsubscribe()


async def _newest(bus: Bus, reader: WeightsReader, version: int, *, surely: bool) -> Weights | None:
    """Reads; `surely`: a manifest was sent, so look again if the stream does not have it yet."""
    for seconds in _AFTER_WAKING_SECONDS if surely else (0.0,):
        await asyncio.sleep(seconds)
        try:
            weights = await reader.newer_than(version)
        except ConnectionFailed as error:
            reader.trouble = str(error).removeprefix("weights: ")
            await bus.connected()
            await asyncio.sleep(RETRY_SECONDS)
        else:
            if weights is not None:
                return weights
    return None


async def _publish_set(bus: Bus, data: bytes, manifest: dict[str, Any]) -> int:
    publish = partial(published, what="weights")
    size = min(MAX_PART_BYTES, bus.max_payload)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    parts: list[int] = []
    for some in _in_flight(tuple(range(len(pieces)))):
        publishing = (publish(bus, bus.subjects.weights_part(part), pieces[part]) for part in some)
        parts += await asyncio.gather(*publishing)
    return await publish(bus, bus.subjects.weights_manifest, orjson.dumps({**manifest, "parts": parts}))


async def _newest_manifest(bus: Bus) -> _Manifest | None:
    with trouble("weights"):
        try:
            message = await bus.js.get_last_msg(
                bus.subjects.weights_stream, bus.subjects.weights_manifest, direct=True
            )
        except (NotFoundError, nats.errors.NoRespondersError):  # no manifest, or no stream
            return None
    return _parsed(message)


def _parsed(message: RawStreamMsg) -> _Manifest:
    raw = orjson.loads(message.data or b"{}")
    if raw.get("format_version") != WEIGHTS_FORMAT_VERSION:
        raise Refused(
            f"weights have format version {raw.get('format_version')}, this program {WEIGHTS_FORMAT_VERSION}"
        )
    return _Manifest(
        version=int(message.seq or 0),
        update=int(raw["update"]),
        network_hash=str(raw["network_hash"]),
        parts=tuple(raw["parts"]),
        sha256=str(raw["sha256"]),
    )


def _in_flight(numbers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(numbers), _IN_FLIGHT):
        yield numbers[start : start + _IN_FLIGHT]


async def _sha256(data: bytes) -> str:
    if len(data) < _HASHED_IN_A_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
