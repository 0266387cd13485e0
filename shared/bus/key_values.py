"""What a run agreed on: its spec, whether it is paused, and who holds a lease that only one may hold."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import orjson
import structlog
from nats.errors import Error
from nats.js import api
from nats.js.errors import BadRequestError, BucketNotFoundError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from shared.bus.beside import beside
from shared.bus.connection import RETRY_SECONDS, Bus
from shared.bus.streams import run_bucket
from shared.bus.trouble import STREAM_NAME_IN_USE, refusal, trouble
from shared.errors import ConfigurationError, ConnectionFailed, Refused
from shared.specs import RunSpec

LEARNER_LEASE = "learner"
REPLAY_LEASE = "replay"
LEASE_SECONDS = 5.0
KEEP_SECONDS = 2.0
"""Between two looks at what NATS may have lost with its store."""
_SPEC_KEY = "spec"
_PAUSED_KEY = "paused"
_RELEASE_SECONDS = 1.0

log = structlog.get_logger(__name__)


async def create_spec(bus: Bus, spec: RunSpec) -> RunSpec:
    """Makes `spec` the run's unless it has one; returns the run's.

    A patient bus tries until it works; otherwise ConnectionFailed. Raises ConfigurationError when the run's
    spec is of another format version.
    """

    async def create() -> RunSpec:
        bucket = await run_bucket(bus)
        with trouble("run spec"), suppress(KeyWrongLastSequenceError, KeyNotFoundError):
            await bucket.create(_SPEC_KEY, spec.to_json())
            return spec
        if (found := await _spec_there(bus)) is None:
            raise ConnectionFailed("run spec: lost while it was read")
        return found

    return await bus.persistently(create)


async def keep_spec(bus: Bus, spec: RunSpec) -> None:
    """Puts the run's `spec` back, for ever, where NATS lost it with its store.

    Raises ConfigurationError when the run has got another one since.
    """
    while True:
        found = await bus.persistently(partial(_spec_there, bus)) or await create_spec(bus, spec)
        if difference := found.disagreement(spec):
            raise ConfigurationError(
                f"run {bus.run_id} was begun anew with other settings after NATS lost its store: {difference}"
            )
        await asyncio.sleep(KEEP_SECONDS)


async def _spec_there(bus: Bus) -> RunSpec | None:
    with trouble("run spec"), suppress(BucketNotFoundError, KeyNotFoundError):
        bucket = await bus.js.key_value(bus.subjects.bucket)
        entry = await bucket.get(_SPEC_KEY)
        return RunSpec.from_json(entry.value or b"")
    return None


async def wait_for_spec(bus: Bus) -> RunSpec:
    """The run's spec, as soon as somebody creates it.

    A patient bus waits through any outage; otherwise ConnectionFailed. Raises ConfigurationError as
    `create_spec`.
    """
    while True:
        spec = await bus.persistently(partial(_spec_there, bus))
        if spec is not None:
            return spec
        await asyncio.sleep(RETRY_SECONDS)


async def keep_paused(bus: Bus, is_paused: bool) -> None:
    """Keeps whether the run is paused, for services that start later.

    A patient bus tries until it works; otherwise ConnectionFailed.
    """

    async def keep() -> None:
        bucket = await run_bucket(bus)
        with trouble("pause"):
            if is_paused:
                await bucket.put(_PAUSED_KEY, b"1")
            else:
                await bucket.delete(_PAUSED_KEY)

    await bus.persistently(keep)


async def kept_paused(bus: Bus) -> bool:
    """What `keep_paused` was told last. A patient bus waits through outages; otherwise ConnectionFailed."""

    async def look() -> bool:
        with trouble("pause"), suppress(BucketNotFoundError, KeyNotFoundError):
            bucket = await bus.js.key_value(bus.subjects.bucket)
            await bucket.get(_PAUSED_KEY)
            return True
        return False

    return await bus.persistently(look)


def boot_seconds() -> float:
    """A clock that also runs while the machine is suspended, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@asynccontextmanager
async def held_lease(
    bus: Bus,
    name: str,
    owner: str,
    *,
    ttl: float = LEASE_SECONDS,
    clock: Callable[[], float] = boot_seconds,
) -> AsyncIterator["Lease"]:
    """Holds the run's lease `name` during the block; `owner` says in words who holds it.

    A lease somebody else holds is waited for, 2·`ttl` seconds: that long it takes at most to see that its
    holder died. Then Refused, naming the owner. A holder without a connection goes on; if somebody else took
    the lease meanwhile, its block ends with Refused: soon, and before `Lease.confirmed` returns. Released on
    leaving: the next start is immediate. `clock` is in seconds and runs also while the process is stopped.
    """
    lease = Lease(bus, name, owner, ttl, clock)
    await lease.acquire()
    try:
        async with beside(lease.keep()):
            yield lease
    finally:
        await lease.release()


async def lease_owner(bus: Bus, name: str) -> str | None:
    """Who holds the run's lease `name`, in words; None when it is free. Raises ConnectionFailed."""
    with trouble(f"the lease {name!r} of run {bus.run_id}"), suppress(BucketNotFoundError, KeyNotFoundError):
        bucket = await bus.js.key_value(bus.subjects.leases_bucket)
        entry = await bucket.get(name)
        return str(orjson.loads(entry.value or b"{}").get("owner"))
    return None


class Lease:
    """One process's claim: an entry in a bucket whose entries expire, renewed at its last revision only."""

    def __init__(self, bus: Bus, name: str, owner: str, ttl: float, clock: Callable[[], float]) -> None:
        self._bus = bus
        self._name = name
        self._what = f"the lease {name!r} of run {bus.run_id}"
        self._ttl = ttl
        self._holder = secrets.token_hex(8)
        self._value = orjson.dumps({"owner": owner, "holder": self._holder})
        self._revision = 0
        self._clock = clock
        self._expires_at = clock()  # by the clock; until then nobody else can have it
        self._renewing = asyncio.Lock()

    @property
    def is_certain(self) -> bool:
        """Whether nobody else can have the lease now."""
        return self._clock() < self._expires_at

    async def confirmed(self) -> None:
        """Returns once it is known that nobody else has the lease: at once, unless the process stood still.

        Waits for a connection. Raises Refused when somebody else holds it.
        """
        while not self.is_certain:
            await self._renew()

    async def acquire(self) -> None:
        """Takes the lease, waiting for it up to 2·ttl; raises Refused when it stays taken."""
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        while (owner := await self._bus.persistently(self._take)) is not None:
            if deadline is None:
                deadline = loop.time() + 2 * self._ttl
                log.info("lease_taken", lease=self._name, owner=owner)
            if loop.time() >= deadline:
                raise Refused(f"{self._what} is held by {owner}")
            await asyncio.sleep(min(RETRY_SECONDS, self._ttl / 10))

    async def keep(self) -> None:
        """Renews for ever; raises Refused when somebody else holds the lease."""
        while True:
            await asyncio.sleep(self._ttl / 3)
            await self._renew()

    async def release(self) -> None:
        """Gives the lease up if it is still held; best effort, since it expires by itself."""
        with suppress(Error, ConnectionFailed, TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                bucket = await self._bucket()
                await bucket.delete(self._name, last=self._revision)

    async def _renew(self) -> None:
        """Renews, waiting for a connection; raises Refused when somebody else holds the lease."""
        async with self._renewing:
            while not await self._renewed():
                await self._bus.connected()  # then at once, before the entry expires
                await asyncio.sleep(min(RETRY_SECONDS, self._ttl / 10))

    async def _renewed(self) -> bool:
        """Whether the server took the renewal; raises Refused when somebody else holds the lease."""
        try:
            bucket = await self._bucket()
            sent_at = self._clock()
            with trouble(self._what), suppress(KeyWrongLastSequenceError):
                self._revision = await bucket.update(self._name, self._value, last=self._revision)
                self._expires_at = sent_at + self._ttl
                return True
            owner = await self._take()
        except ConnectionFailed:
            return False
        if owner is not None:
            raise Refused(f"{self._what} was lost to {owner}")
        log.warning("lease_renewed_late", lease=self._name)
        return True

    async def _take(self) -> str | None:
        """Takes the lease if it is free or this process's own; otherwise returns its owner's words."""
        bucket = await self._bucket()
        while True:
            with trouble(self._what):
                # Either error means that the entry changed between two steps: look again.
                with suppress(KeyWrongLastSequenceError, KeyNotFoundError):
                    sent_at = self._clock()
                    self._revision = await bucket.create(self._name, self._value)
                    self._expires_at = sent_at + self._ttl
                    return None
                with suppress(KeyNotFoundError):
                    entry = await bucket.get(self._name)
                    holds = orjson.loads(entry.value or b"{}")
                    if holds.get("holder") != self._holder:
                        return str(holds.get("owner"))
                    self._revision = entry.revision or 0
                    return None

    async def _bucket(self) -> KeyValue:
        name = self._bus.subjects.leases_bucket
        config = api.KeyValueConfig(bucket=name, ttl=self._ttl, storage=api.StorageType.FILE, direct=False)
        what = f"bucket {name}"
        with trouble(what), refusal(what):
            try:
                return await self._bus.js.create_key_value(config)
            except BadRequestError as error:
                if error.err_code != STREAM_NAME_IN_USE:
                    raise
            info = await self._bus.js.stream_info(f"KV_{name}")  # made with another ttl
            window = min(self._ttl, info.config.duplicate_window)
            await self._bus.js.update_stream(info.config.evolve(max_age=self._ttl, duplicate_window=window))
            return await self._bus.js.key_value(name)
