"""Replay's Prometheus metrics: some counted as things happen, the others read when somebody asks."""

from collections import Counter
from collections.abc import Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.replay.items import Refusal
from services.replay.report import Report
from services.replay.table import Inserted, Sampled
from shared.families import Families

_PREFIX = "seedrl_replay"
_AGES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
_USES = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55)


class ReplayMetrics:
    """What is counted as it happens, since the start; registered on the registry that is passed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> PrometheusCounter:
            return PrometheusCounter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, buckets=buckets, registry=registry)

        self.registry = registry
        self.gaps = counter("gaps_total", "Rows before which chunks of their stream are missing.")
        self.stale_rows = counter("stale_rows_total", "Rows dropped: delivered again, or overtaken.")
        self.removed = counter("removed_items_total", "Sequences that made room for newer ones.")
        self.removed_age = histogram("removed_item_age_seconds", "Age of sequences when removed.", _AGES)
        self.removed_uses = histogram("removed_item_uses", "How often sequences were sampled in all.", _USES)
        self.sampled_age = histogram("sampled_item_age_seconds", "Age of sequences when sampled.", _AGES)
        self.sampled_uses = histogram("sampled_item_uses", "How often sequences were sampled so far.", _USES)
        self.updated = counter("updated_priorities_total", "New priorities that are in force.")
        self.refused_priorities = counter(
            "refused_priorities_total", "New priorities that changed nothing.", "reason"
        )
        self.refused_requests = counter("refused_requests_total", "Requests that were refused.")
        self.snapshots = counter("snapshots_total", "Snapshots written.")
        self.snapshot_failures = counter("snapshot_failures_total", "Snapshots that could not be written.")
        for reason in get_args(Refusal):
            self.refused_priorities.labels(reason)

    def inserted(self, inserted: Inserted) -> None:
        """A message was inserted."""
        self.gaps.inc(inserted.gaps)
        self.stale_rows.inc(inserted.stale)
        self.removed.inc(len(inserted.removed.ages))
        _observe(self.removed_age, inserted.removed.ages)
        _observe(self.removed_uses, inserted.removed.uses)

    def sampled(self, sampled: Sampled) -> None:
        """A batch was sampled."""
        _observe(self.sampled_age, sampled.ages)
        _observe(self.sampled_uses, sampled.uses)

    def priorities(self, count: int, refused: Counter[Refusal]) -> None:
        """Of `count` new priorities some were refused."""
        self.updated.inc(count - refused.total())
        for reason, number in refused.items():
            self.refused_priorities.labels(reason).inc(number)


class ReportMetrics(Collector):
    """Turns the report into metric families; counters go on over restarts, as the accounts do."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._families = Families(_PREFIX)

    def collect(self) -> Iterator[Metric]:
        """All families, with the values of now."""
        accounts, counter = self._report.accounts, self._families.counter
        yield counter("inserted_items", "Sequences inserted.", accounts.inserted_items)
        yield counter("sampled_items", "Sequences sampled.", accounts.sampled_items)
        yield counter("steps", "Environment steps in inserted and refused chunks.", self._report.steps)
        yield counter("redelivered_chunks", "Messages delivered more than once.", accounts.redelivered)
        yield counter("rolled_back_chunks", "Inserted messages that crashes lost.", accounts.rolled_back)
        refused = {f"refused_{reason}": count for reason, count in accounts.refused.items()}
        yield self._families.counters(
            "chunks",
            "Messages done with, by what became of them.",
            label="outcome",
            values={"inserted": accounts.inserted, **refused},
        )
        yield from self._report.activity.collect()
        yield from self._gauges()
        yield from self._blocked()

    def _gauges(self) -> Iterator[Metric]:
        status, gauge = self._report.table_status(), self._families.gauge
        yield gauge("items", "Sequences held.", status["items"])
        yield gauge("size_bytes", "Bytes of the chunk rows held.", status["bytes"])
        yield gauge("rows", "Chunk rows held, each counted once.", status["rows"])
        yield gauge("streams", "Streams whose sequences may go on.", status["streams"])
        yield gauge("samples_per_insert", "Sequences sampled per sequence inserted.", self._report.ratio)
        yield gauge("limiter_balance", "Samples owed to inserts, within the buffer.", status["balance"])
        yield gauge("queued_chunks", "Messages in the work queue.", self._report.queue.messages)
        yield gauge("held_chunks", "Messages of the work queue in hand.", self._report.held())

    def _blocked(self) -> Iterator[Metric]:
        sides = self._report.blocked()
        blocked = GaugeMetricFamily(f"{_PREFIX}_blocked", "1 while that side waits.", labels=["side"])
        for side, (is_blocked, _) in sides.items():
            blocked.add_metric([side], float(is_blocked))
        yield blocked
        yield self._families.counters(
            "blocked_seconds",
            "How long that side waited, since the start.",
            label="side",
            values={side: total for side, (_, total) in sides.items()},
        )


def _observe(histogram: Histogram, values: NDArray[np.floating] | NDArray[np.int64]) -> None:
    for value in values.tolist():
        histogram.observe(value)
