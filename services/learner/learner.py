"""One learner from start to end: what it waits for, its training loop, how it ends."""

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from services.learner.accounts import CHECKPOINTS, completed, has_begun, load_accounts
from services.learner.config import LearnerConfig
from services.learner.feeding import Feeder
from services.learner.housekeeping import Housekeeping
from services.learner.optimizing import warm_up
from services.learner.prefetching import Prefetching
from services.learner.publishing import Snapshot, WeightsPublisher
from services.learner.r2d2 import R2D2Trainer
from services.learner.replay_link import ReplayLink
from services.learner.report import Report
from services.learner.rows import RowQueue
from services.learner.sampling import Replay, SequenceFeeder
from services.learner.session import Session
from services.learner.settling import Bookkeeper
from shared.accounts import write_accounts
from shared.bus.beside import beside
from shared.bus.connection import Bus
from shared.bus.key_values import LEARNER_LEASE, Lease, held_lease, keep_spec, wait_for_spec
from shared.bus.work_queue import QueueConsumer, queue_state, still_queued
from shared.directory_lock import locked_directory
from shared.errors import RunError
from shared.run_spec import check_settings
from shared.runtime import in_thread
from shared.specs import RunSpec
from shared.telemetry import Progress, get_logger

_WAIT_SECONDS = 0.5  # for a batch, before the next heartbeat
_FIRST_CHECKPOINT_SECONDS = 10.0  # a new run learns fast, and there is little to save
_SNAPSHOT_SECONDS = 60.0  # for replay's, which may be away
_SHARE_OF_GRACE = 0.5  # for all that others have to take at the end; the rest is for what this process does
_LEAST_SHARE_OF_GRACE = 0.1  # for the same after an update that took long

log = get_logger(__name__)


class Parts(NamedTuple):
    """What a training is made of."""

    session: Session
    books: Bookkeeper
    feeder: Prefetching[Any]
    publisher: WeightsPublisher
    housekeeping: Housekeeping


class Learner:
    """Trains the run of `config` and keeps `report` up to date; `end` makes it save and return.

    `replay` is where the agent r2d2 takes its sequences from; vtrace takes trajectories from the work queue.
    """

    def __init__(
        self,
        config: LearnerConfig,
        bus: Bus,
        report: Report,
        progress: Progress,
        *,
        owner: str,
        replay: Replay | None = None,
    ) -> None:
        self.is_training = False
        self._config = config
        self._bus = bus
        self._report = report
        self._progress = progress
        self._owner = owner
        self._link = ReplayLink(replay, report) if replay is not None else None
        self._patient_until = 0.0  # by the loop's clock, once training ends
        self._session: Session | None = None
        self._books: Bookkeeper | None = None
        self._threads = ExitStack()
        self._training = self._thread("training")
        self._staging = self._thread("staging")
        self._writing = self._thread("writing")

    def end(self, reason: str) -> None:
        """Ends training after the update that runs; the first reason counts."""
        if self._report.exit_reason is None:
            self._report.exit_reason = reason
            self._patient_until = _now() + _SHARE_OF_GRACE * self._config.grace_seconds

    async def save(self, *, with_snapshot: bool = True) -> str:
        """Saves a checkpoint between two updates; says so in words.

        `with_snapshot`: then waits for the snapshot of replay that goes with it. Any number of calls at once;
        none holds up another's checkpoint. Raises RunError before training, and when it cannot be written.
        """
        session, books = self._session, self._books
        if session is None or books is None:
            raise RunError("there is nothing to save before training has begun")
        try:
            save = partial(session.save, steps=await books.steps_for_checkpoint())
            name, updates = await in_thread(save, self._training)
        except RunError:
            self._report.checkpoint_failures += 1
            raise
        self._report.checkpoint = name
        words = f"saved {name} at update {updates}"
        if with_snapshot and self._link is not None and self.is_training:
            words += "; " + await self._link.snapshot(updates, within=_SNAPSHOT_SECONDS)
        return words

    async def run(self) -> None:
        """Waits for lease, spec and directory, restores, trains until `end` or the configured end, saves."""
        with self._threads:
            self._training.submit(warm_up)  # while lease and spec are waited for
            self._await("the lease of the run's learner")
            async with held_lease(self._bus, LEARNER_LEASE, self._owner) as lease:
                self._await("the run's spec, which the first actor's environment decides")
                spec = await wait_for_spec(self._bus)
                check_settings(self._config, spec, service="the learner")
                async with locked_directory(self._config.directory / CHECKPOINTS, on_wait=self._await):
                    self._await("its network and checkpoint to be loaded")
                    parts = self._parts(await self._restored(spec), lease)
                    vtrace = self._link is None
                    self._await("the first trajectory" if vtrace else "the first sequences from replay")
                    await self._live(parts)

    def _await(self, what: str) -> None:
        self._report.awaited = [what]

    async def _restored(self, spec: RunSpec) -> Session:
        """The session; the report's accounts are then what queue, journal and checkpoint together say."""
        config, bus = self._config, self._bus
        known = has_begun(config.directory)
        accounts = load_accounts(config.directory)
        session = await in_thread(partial(Session, config, spec, accounts), self._training)
        queued = await bus.persistently(partial(still_queued, bus, accounts.in_doubt))
        accounts.resolve(still_queued=queued)
        if self._link is None:  # else the messages are replay's
            accounts.settle_queue(await bus.persistently(partial(queue_state, bus)), known=known)
        write = partial(write_accounts, config.directory, accounts.to_json(), durable=True)
        await in_thread(write, self._writing)
        self._session, self._report.accounts = session, accounts
        log.info(
            "training begins",
            updates=accounts.updates,
            steps=accounts.steps,
            rolled_back=accounts.rolled_back,
            came_back=len(queued),
            device=str(session.trainer.device),
            network=spec.network.name,
        )
        return session

    def _parts(self, session: Session, lease: Lease) -> Parts:
        config, bus, report = self._config, self._bus, self._report
        self._books = books = Bookkeeper(report.accounts, config.directory, self._writing, claim=lease)
        report.held, report.journal_trouble = lambda: books.held, lambda: books.trouble
        report.journaled = lambda: (books.journaled_steps, books.journaled_updates)
        feeder = self._feeder(session, books)

        async def snapshot() -> Snapshot:
            return await in_thread(session.snapshot, self._training)

        def published(version: int) -> None:
            report.weights_version = version

        publisher = WeightsPublisher(
            bus,
            snapshot,
            journaled=books.journaled,
            on_version=published,
            network_hash=session.spec.network_hash,
            interval_seconds=config.publish_seconds,
        )
        report.weights_trouble = lambda: publisher.trouble
        housekeeping = Housekeeping(bus, report, books, run_dir=config.directory, executor=self._writing)
        return Parts(session, books, feeder, publisher, housekeeping)

    def _feeder(self, session: Session, books: Bookkeeper) -> Prefetching[Any]:
        config, trainer = self._config, session.trainer
        if isinstance(trainer, R2D2Trainer):
            assert self._link is not None
            return SequenceFeeder(
                self._link.replay,
                trainer,
                books,
                self._staging,
                config=config,
                spec=session.spec,
                state=session.state_layout,
            )
        return Feeder(
            QueueConsumer(self._bus),
            RowQueue(batch_size=config.batch_size, max_policy_lag=config.max_policy_lag),
            books,
            self._staging,
            spec=session.spec,
            state=session.state_layout,
            run_id=config.run_id,
            device=trainer.device,
        )

    async def _live(self, parts: Parts) -> None:
        """Trains with everything that belongs beside it, then leaves the run directory complete."""
        session, books, feeder, publisher, housekeeping = parts
        async with beside(
            books.run(),
            books.keep_alive(),
            publisher.run(),
            publisher.keep(),
            keep_spec(self._bus, session.spec),
            housekeeping.follow_episodes(),
            housekeeping.tick(),
            housekeeping.follow_statuses(),
            self._save_now_and_then(),
            *self._beside_replay(feeder),
        ):
            await self.save()
            books.write_soon()
            publisher.offer()
            self.is_training = True
            async with beside(feeder.run(session.trainer.updates)):
                await self._train(parts)
            saved = await self.save(with_snapshot=False)
            log.info("training ends", reason=self._report.exit_reason, done=saved)
            await self._take_leave(parts)
        await books.close()
        await housekeeping.close()

    async def _train(self, parts: Parts) -> None:
        report = self._report
        waiting_since = report.waiting_since = time.monotonic()
        self._end_if_done()
        while report.exit_reason is None:
            self._progress.beat("training")
            prepared = await parts.feeder.next_within(_WAIT_SECONDS)
            report.has_chunks = report.has_chunks or parts.feeder.has_seen_chunks
            started = time.monotonic()
            if prepared is None:
                report.starved_seconds = started - waiting_since
                self._end_if_done()
                continue
            report.awaited, report.starved_seconds = [], 0.0
            report.waited(until=started)
            update = partial(parts.session.train, prepared.batch, steps=report.accounts.steps)
            report.training_since = started
            report.update = await in_thread(update, self._training)
            waiting_since = time.monotonic()
            report.training_since = None
            report.training_seconds += waiting_since - started
            parts.feeder.count(prepared, updates=parts.session.trainer.updates)
            parts.publisher.offer()
            report.counting_seconds += time.monotonic() - waiting_since
            waiting_since = report.waiting_since = time.monotonic()
            self._end_if_done()
        report.waited(until=time.monotonic())

    def _end_if_done(self) -> None:
        accounts, config = self._report.accounts, self._config
        if reason := completed(accounts, total_steps=config.total_steps, max_seconds=config.max_seconds):
            self.end(reason)

    async def _take_leave(self, parts: Parts) -> None:
        """Lets NATS and replay, side by side, take what was trained; who does not in time is left behind."""
        least = _now() + _LEAST_SHARE_OF_GRACE * self._config.grace_seconds
        self._patient_until = max(self._patient_until, least)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._settle(parts))
            group.create_task(self._leave_replay(parts))

    async def _settle(self, parts: Parts) -> None:
        """Acknowledges and publishes what was trained; without NATS, the journal says what is left to do."""

        async def settle() -> None:
            await parts.books.settled()
            await parts.publisher.published(parts.session.trainer.updates)

        await self._in_time(settle(), "NATS did not take the last acknowledgements and weights in time")

    async def _leave_replay(self, parts: Parts) -> None:
        """The last priorities, then the snapshot that goes with the last checkpoint."""
        if self._link is None:
            return
        if await self._in_time(parts.feeder.sent(), "replay did not take the last priorities in time"):
            within = max(0.0, self._patient_until - _now())
            await self._link.snapshot(parts.session.trainer.updates, within=within)

    async def _in_time(self, awaited: Coroutine[Any, Any, None], complaint: str) -> bool:
        """Waits for what comes at the end, no longer than for everything else that does; whether it came."""
        try:
            async with asyncio.timeout_at(self._patient_until):
                await awaited
        except TimeoutError:
            log.warning(complaint)
            return False
        return True

    def _beside_replay(self, feeder: Prefetching[Any]) -> list[Coroutine[Any, Any, None]]:
        if self._link is None or not isinstance(feeder, SequenceFeeder):
            return []
        return [feeder.send_priorities(), self._link.follow()]

    async def _save_now_and_then(self) -> None:
        """For ever; a failure is logged, the next may succeed."""
        accounts, seconds = self._report.accounts, self._config.checkpoint_seconds
        has_saved_updates = accounts.updates > 0
        while True:
            await asyncio.sleep(seconds if has_saved_updates else min(seconds, _FIRST_CHECKPOINT_SECONDS))
            if self.is_training and accounts.updates > 0:
                try:
                    await self.save()
                    has_saved_updates = True
                except RunError as error:
                    log.error("no checkpoint", reason=str(error))

    def _thread(self, name: str) -> ThreadPoolExecutor:
        return self._threads.enter_context(ThreadPoolExecutor(1, thread_name_prefix=name))


def _now() -> float:
    return asyncio.get_running_loop().time()
