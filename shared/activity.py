"""Where a service's time goes: work, waiting for input, waiting for those who take its output."""

from collections import deque
from collections.abc import Callable, Iterator
from threading import Lock
from time import monotonic
from types import TracebackType
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

WINDOW_SECONDS = 10.0


class Shares(NamedTuple):
    """Of a service's time, or in seconds of it."""

    work: float
    input: float
    output: float


class Activity(Collector):
    """Totals since the start, for Prometheus, and shares of the last seconds, for /status.

    `work` and `output` say the seconds so far, with those of what is going on: it may last, or be stopped.
    What is left of the time is `input`.
    """

    def __init__(
        self,
        service: str,
        work: Callable[[], float],
        output: Callable[[], float] = lambda: 0.0,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._name = f"seedrl_{service}_activity_seconds"
        self._work, self._output, self._clock = work, output, clock
        self._start = clock()
        self._input = 0.0
        self._samples = deque([Shares(0.0, 0.0, 0.0)])

    def totals(self) -> Shares:
        """Seconds since the start. None of them ever falls, not even where work is told too late."""
        elapsed = self._clock() - self._start
        work, output = self._work(), self._output()
        self._input = max(self._input, elapsed - work - output)
        return Shares(work, self._input, output)

    def sample(self) -> None:
        """Takes the totals of now; to be called about each second."""
        self._samples.append(self.totals())
        while len(self._samples) > 2 and sum(self._samples[-1]) - sum(self._samples[1]) >= WINDOW_SECONDS:
            self._samples.popleft()

    def shares(self) -> dict[str, float]:
        """Of the last ten seconds or so, by name; zeros at first."""
        first, last = self._samples[0], self._samples[-1]
        spans = [max(0.0, now - before) for now, before in zip(last, first, strict=True)]
        whole = sum(spans) or 1.0
        return {name: round(span / whole, 3) for name, span in zip(Shares._fields, spans, strict=True)}

    def collect(self) -> Iterator[Metric]:
        """The totals."""
        text = "What the time went into: work, waiting for input, waiting for output to be taken."
        family = CounterMetricFamily(self._name, text, labels=["activity"])
        for name, seconds in self.totals()._asdict().items():
            family.add_metric([name], seconds)
        yield family


class Spent:
    """Seconds that one or several at a time are within it, as a context manager, in any thread.

    What is going on counts while it does, and the sum never falls.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._within = 0
        self._seconds, self._since = 0.0, clock()

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._change(-1)

    def seconds(self) -> float:
        """The sum so far."""
        with self._lock:
            return self._seconds + self._within * (self._clock() - self._since)

    def _change(self, within: int) -> None:
        with self._lock:
            now = self._clock()
            self._seconds += self._within * (now - self._since)
            self._since = now
            self._within += within


class SpentCounter(Spent, Collector):
    """The same as a counter for Prometheus, which so grows while somebody waits, not afterwards."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        super().__init__()
        self._name, self._text = name, text
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The sum so far."""
        yield CounterMetricFamily(self._name, self._text, value=self.seconds())
