"""The learner's Prometheus metrics, read from its report whenever somebody asks."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.learner.report import Report
from shared.families import Families

_PREFIX = "seedrl_learner"
_LAG_BUCKETS = (0, *(2**power for power in range(18)))  # R2D2's is in the thousands


class LearnerMetrics(Collector):
    """Turns a report into metric families; counters go on over restarts, as the accounts do."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._families = Families(_PREFIX)

    def collect(self) -> Iterator[Metric]:
        """All families, with the values of now."""
        yield from self._counters()
        yield from self._chunks()
        yield from self._gauges()

    def _counters(self) -> Iterator[Metric]:
        report, accounts, counter = self._report, self._report.accounts, self._families.counter
        yield counter("updates", "Updates of the weights.", report.updates)
        yield counter("rolled_back_updates", "Updates that crashes lost.", accounts.rolled_back)
        yield counter("steps", "Environment steps in trained and refused chunks.", report.steps)
        if report.agent == "r2d2":
            yield counter("sequences", "Sequences trained.", accounts.sequences)
        yield counter("episodes", "Finished training episodes.", accounts.episodes)
        failures = report.checkpoint_failures
        yield counter("checkpoint_failures", "Checkpoints that could not be written.", failures)
        yield counter("redelivered_chunks", "Messages delivered more than once.", accounts.redelivered)
        yield from report.activity.collect()

    def _chunks(self) -> Iterator[Metric]:
        accounts, gauge = self._report.accounts, self._families.gauge
        refused = {f"refused_{reason}": count for reason, count in accounts.refused.items()}
        yield self._families.counters(
            "chunks",
            "Messages done with, by what became of them.",
            label="outcome",
            values={"trained": accounts.trained, **refused},
        )
        yield gauge("queued_chunks", "Messages in the work queue.", self._report.queue.messages)
        yield gauge("held_chunks", "Messages of the work queue in hand.", self._report.held())

    def _gauges(self) -> Iterator[Metric]:
        accounts, update, gauge = self._report.accounts, self._report.update, self._families.gauge
        yield self._lag(accounts.lags)
        if accounts.mean_return_100 is not None:
            yield gauge("mean_return", "Mean return of the last 100 episodes.", accounts.mean_return_100)
        yield gauge("weights_version", "Newest published weights.", self._report.weights_version)
        if update is not None:
            for name, value in update._asdict().items():
                yield gauge(name, f"{name.replace('_', ' ').capitalize()} of the newest update.", value)

    def _lag(self, lags: Mapping[int, int]) -> Metric:
        name = "policy_lag_updates"
        inside = [0] * (len(_LAG_BUCKETS) + 1)
        for lag, count in lags.items():
            inside[bisect_left(_LAG_BUCKETS, lag)] += count
        bounds = (*(str(float(bound)) for bound in _LAG_BUCKETS), "+Inf")
        total = float(sum(lag * count for lag, count in lags.items()))
        return HistogramMetricFamily(
            f"{_PREFIX}_{name}",
            "Policy lag of all trained chunks.",
            buckets=[
                (bound, self._families.highest(name, bound, float(below)))
                for bound, below in zip(bounds, accumulate(inside), strict=True)
            ],
            sum_value=self._families.highest(name, "sum", total),
        )
