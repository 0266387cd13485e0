"""The learner's Prometheus metrics, read from its report whenever somebody asks."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.learner.report import Report

_PREFIX = "seedrl_learner"
_LAG_BUCKETS = (0, *(2**power for power in range(18)))  # R2D2's is in the thousands


class LearnerMetrics(Collector):
    """Turns a report into metric families; counters go on over restarts, as the accounts do."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """All families, with the values of now."""
        yield from self._counters()
        yield from self._chunks()
        yield from self._gauges()

    def _counters(self) -> Iterator[Metric]:
        report, accounts = self._report, self._report.accounts
        yield _counter("updates", "Updates of the weights.", accounts.updates)
        yield _counter("rolled_back_updates", "Updates that crashes lost.", accounts.rolled_back)
        yield _counter("steps", "Environment steps in trained and refused chunks.", accounts.steps)
        if report.agent == "r2d2":
            yield _counter("sequences", "Sequences trained.", accounts.sequences)
        yield _counter("episodes", "Finished training episodes.", accounts.episodes)
        failures = report.checkpoint_failures
        yield _counter("checkpoint_failures", "Checkpoints that could not be written.", failures)
        yield _counter("redelivered_chunks", "Messages delivered more than once.", accounts.redelivered)
        yield from report.activity.collect()

    def _chunks(self) -> Iterator[Metric]:
        accounts = self._report.accounts
        chunks = CounterMetricFamily(
            f"{_PREFIX}_chunks", "Messages done with, by what became of them.", labels=["outcome"]
        )
        chunks.add_metric(["trained"], accounts.trained)
        for reason, count in accounts.refused.items():
            chunks.add_metric([f"refused_{reason}"], count)
        yield chunks
        yield _gauge("queued_chunks", "Messages in the work queue.", self._report.queue.messages)
        yield _gauge("held_chunks", "Messages of the work queue in hand.", self._report.held)

    def _gauges(self) -> Iterator[Metric]:
        accounts, update = self._report.accounts, self._report.update
        yield _lag(accounts.lags)
        if accounts.mean_return_100 is not None:
            yield _gauge("mean_return", "Mean return of the last 100 episodes.", accounts.mean_return_100)
        yield _gauge("weights_version", "Newest published weights.", self._report.weights_version)
        if update is not None:
            for name, value in update._asdict().items():
                yield _gauge(name, f"{name.replace('_', ' ').capitalize()} of the newest update.", value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _lag(lags: Mapping[int, int]) -> Metric:
    inside = [0] * (len(_LAG_BUCKETS) + 1)
    for lag, count in lags.items():
        inside[bisect_left(_LAG_BUCKETS, lag)] += count
    bounds = (*(str(float(bound)) for bound in _LAG_BUCKETS), "+Inf")
    return HistogramMetricFamily(
        f"{_PREFIX}_policy_lag_updates",
        "Policy lag of all trained chunks.",
        buckets=[(bound, float(below)) for bound, below in zip(bounds, accumulate(inside), strict=True)],
        sum_value=float(sum(lag * count for lag, count in lags.items())),
    )
