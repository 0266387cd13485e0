"""Prometheus metric families made of figures that a service has anyway."""

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric


class Families:
    """Families whose names begin with `prefix`.

    A counter never falls, whatever its figure does: Prometheus takes a fall for a start from zero, and would
    count all of it again. Accounts fall after a crash, until what was not acknowledged has come again.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._highest: defaultdict[tuple[str, str], float] = defaultdict(float)

    def counter(self, name: str, text: str, value: float) -> Metric:
        """One counter."""
        return CounterMetricFamily(f"{self._prefix}_{name}", text, value=self.highest(name, "", value))

    def counters(self, name: str, text: str, *, label: str, values: Mapping[str, float]) -> Metric:
        """One counter per value of `label`."""
        family = CounterMetricFamily(f"{self._prefix}_{name}", text, labels=[label])
        for each, value in values.items():
            family.add_metric([each], self.highest(name, each, value))
        return family

    def gauge(self, name: str, text: str, value: float) -> Metric:
        """One gauge."""
        return GaugeMetricFamily(f"{self._prefix}_{name}", text, value=value)

    def highest(self, name: str, label: str, value: float) -> float:
        """The highest value so far."""
        self._highest[name, label] = highest = max(self._highest[name, label], value)
        return highest
