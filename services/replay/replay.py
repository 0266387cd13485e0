"""One replay from start to end: what it waits for, what it restores, what runs side by side, how it ends."""

import asyncio
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.replay.accounts import Accounts, load_accounts
from services.replay.config import ReplayConfig
from services.replay.feeding import MESSAGES_IN_HAND, Feeder
from services.replay.gate import Gate
from services.replay.metrics import ReplayMetrics
from services.replay.report import Report
from services.replay.saving import Saver
from services.replay.settling import Bookkeeper
from services.replay.shelf import Shelf
from services.replay.snapshots import Snapshot, Snapshots
from shared.bus.beside import beside
from shared.bus.connection import Bus
from shared.bus.key_values import REPLAY_LEASE, Lease, held_lease, wait_for_spec
from shared.bus.replay_serving import serve_replay
from shared.bus.work_queue import QueueConsumer, queue_state, still_queued
from shared.directory_lock import locked_directory
from shared.errors import ConfigurationError, ConnectionFailed, RunError
from shared.run_spec import check_settings
from shared.runtime import in_thread, run_until_stopped
from shared.specs import RunSpec
from shared.telemetry import get_logger
from shared.wire.replay import SampleAnswer

SHORT_SECONDS = 20.0  # for which room for too few sequences is borne with
_LOOK_SECONDS = 1.0
_SHARE_OF_GRACE = 0.25  # for the last acknowledgements; the rest is for the last snapshot

log = get_logger(__name__)


class _Threads(NamedTuple):
    intake: Executor
    writing: Executor
    journal: Executor


class _Parts(NamedTuple):
    gate: Gate
    books: Bookkeeper
    saver: Saver
    feeder: Feeder


class Replay:
    """Keeps the sequences of the run of `config`, and `report` up to date."""

    def __init__(
        self, config: ReplayConfig, bus: Bus, report: Report, metrics: ReplayMetrics, *, owner: str
    ) -> None:
        self._config = config
        self._bus = bus
        self._report = report
        self._metrics = metrics
        self._owner = owner
        self._parts: _Parts | None = None

    @property
    def is_serving(self) -> bool:
        """Whether there is anything to end and to save."""
        return self._parts is not None

    async def run(self, stop: asyncio.Event) -> None:
        """Waits for lease, spec and directory, restores, serves until `stop` is set, and saves."""
        with ExitStack() as stack:
            threads = [
                stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))
                for name in _Threads._fields
            ]
            self._await("the lease of the run's replay")
            async with held_lease(self._bus, REPLAY_LEASE, self._owner) as lease:
                self._await("the run's spec, which the first actor's environment decides")
                spec = await wait_for_spec(self._bus)
                check_settings(self._config, spec, service="replay")
                async with locked_directory(self._config.replay_dir, on_wait=self._await):
                    self._await("its own snapshot")
                    self._parts = parts = await self._restored(spec, _Threads(*threads), lease)
                    self._report.awaited = []
                    async with beside(parts.books.run(), parts.books.keep_alive()):
                        await self._serve(parts, stop)
                        await self._finish(parts)

    async def save(self) -> str:
        """Writes a snapshot; says so in words. Raises RunError before there is anything to save."""
        if self._parts is None:
            raise RunError("there is nothing to save yet")
        done = await self._parts.saver.save("control")
        return f"wrote a snapshot of {done['items']:,} sequences"

    def _await(self, what: str) -> None:
        self._report.awaited = [what]

    async def _restored(self, spec: RunSpec, threads: _Threads, lease: Lease) -> _Parts:
        """Everything as newest snapshot, journal and queue together say."""
        config, report, bus = self._config, self._report, self._bus
        run = {"run_id": config.run_id, "network_hash": spec.network_hash}
        snapshots = Snapshots(config.replay_dir, keep=config.keep_snapshots)
        snapshot = await in_thread(partial(_latest, config, snapshots, run), threads.writing)
        accounts = await in_thread(partial(load_accounts, config.replay_dir), threads.journal)
        is_known, accounts = bool(accounts or snapshot), accounts or Accounts()
        mark = snapshot.beside["mark"] if snapshot else None
        queued = await bus.persistently(partial(still_queued, bus, sorted(accounts.in_doubt_with(mark))))
        accounts.resolve(still_queued=queued)
        accounts.restore(mark, still_queued=queued)
        accounts.settle_queue(await bus.persistently(partial(queue_state, bus)), known=is_known)
        shelf = await in_thread(partial(_shelf, config, snapshot), threads.writing)
        gate = Gate(shelf)
        books = Bookkeeper(
            accounts,
            config.replay_dir,
            threads.journal,
            claim=lease,
            most=MESSAGES_IN_HAND,
        )
        await books.write(durable=True)
        report.gate, report.accounts, report.held = gate, accounts, lambda: books.held
        report.journal_trouble, report.journaled_steps = lambda: books.trouble, lambda: books.journaled_steps
        if snapshot is not None:
            report.restored = f"{shelf.table.size:,} sequences"
            log.info("restored", items=shelf.table.size, rolled_back=accounts.rolled_back)
        saver = Saver(gate, snapshots, books, report, self._metrics, threads.writing, run=run)
        feeder = Feeder(
            QueueConsumer(bus), gate, books, self._metrics, threads.intake, spec=spec, run_id=config.run_id
        )
        return _Parts(gate, books, saver, feeder)

    async def _serve(self, parts: _Parts, stop: asyncio.Event) -> None:
        async def answer() -> None:
            async with serve_replay(
                self._bus,
                on_sample=self._sample,
                on_priorities=self._update,
                on_snapshot=parts.saver.save,
                on_refusal=self._refused,
            ):
                await asyncio.Event().wait()

        await run_until_stopped(
            answer(),
            parts.feeder.run(),
            parts.saver.save_now_and_then(self._config.snapshot_seconds),
            self._look(parts),
            stop=stop,
        )

    async def _finish(self, parts: _Parts) -> None:
        """Acknowledges what was inserted, gives back what was not, and writes a last snapshot."""
        self._await("its end: stopped")
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHARE_OF_GRACE * self._config.grace_seconds):
                await parts.books.settled()
        await parts.books.close()
        await parts.saver.save("end")

    async def _sample(self, count: int) -> SampleAnswer:
        assert self._parts is not None
        sampled = await self._parts.gate.sample(count)
        self._parts.books.accounts.sampled_items += count
        self._metrics.sampled(sampled)
        return SampleAnswer(sampled.keys, sampled.probabilities, sampled.size, sampled.rows)

    async def _update(self, keys: NDArray[np.uint64], priorities: NDArray[np.float64]) -> dict[str, Any]:
        assert self._parts is not None
        refused = self._parts.gate.shelf.update(keys, priorities)
        self._metrics.priorities(len(keys), refused)
        return {"updated": len(keys) - refused.total(), "refused": dict(refused)}

    def _refused(self, words: str) -> None:
        self._metrics.refused_requests.inc()
        log.warning("request refused", words=words)

    async def _look(self, parts: _Parts) -> None:
        """Each second: what the queue says, and whether sampling can ever begin.

        Raises ConfigurationError when it could not for a while: what comes may differ in size.
        """
        short_since: float | None = None
        while True:
            self._report.activity.sample()
            with suppress(ConnectionFailed):
                self._report.queue = await queue_state(self._bus)
            if not (words := parts.gate.shelf.shortage()):
                short_since = None
            elif short_since is None:
                short_since = time.monotonic()
                log.error("sampling cannot begin", words=words)
            elif time.monotonic() - short_since >= SHORT_SECONDS:
                raise ConfigurationError(f"sampling cannot begin: {words}")
            await asyncio.sleep(_LOOK_SECONDS)


def _latest(config: ReplayConfig, snapshots: Snapshots, run: dict[str, Any]) -> Snapshot | None:
    """The newest snapshot of this run. Raises RunError when it is another's."""
    snapshot = snapshots.latest()
    if snapshot is not None and (others := {name: snapshot.beside.get(name) for name in run}) != run:
        raise RunError(f"{config.replay_dir} holds snapshots of another run: {others}, this is {run}")
    return snapshot


def _shelf(config: ReplayConfig, snapshot: Snapshot | None) -> Shelf:
    seed = config.seed if config.seed is not None else int(np.random.default_rng().integers(2**63))
    if snapshot is None:
        return Shelf(config, seed=seed)
    try:
        return Shelf(config, seed=seed, state=snapshot.state)
    except ValueError as error:
        raise RunError(f"the newest snapshot in {config.replay_dir} cannot be used: {error}") from error
