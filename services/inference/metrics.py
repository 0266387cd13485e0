"""Prometheus metrics of the inference service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.inference.held_share import HeldShare
from services.inference.refusal import REASONS
from shared.activity import Spent, SpentCounter

_ROLES = ("train", "eval")
_BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Tally:
    """A counter whose total can be read back, for /status."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self.total = 0

    def add(self, amount: int) -> None:
        """Counts `amount` more."""
        self.total += amount
        self._counter.inc(amount)


class InferenceMetrics:
    """Registered on the registry that is passed in; every series is there from the start."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"seedrl_inference_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"seedrl_inference_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"seedrl_inference_{name}", text, buckets=buckets, registry=registry)

        self.registry = registry
        self.model = Spent()  # in batches
        self.held = HeldShare()  # of the streams, by chunks that cannot leave
        self.batches = Tally(counter("batches_total", "Batches that the network computed."))
        self.rows = Tally(counter("rows_total", "Environments' observations that the network computed."))
        self.batch_rows = histogram("batch_rows", "Rows of a batch.", _BATCH_ROWS)
        self.batch_wait = histogram(
            "batch_wait_seconds", "How long a batch's oldest request waited before it left.", _SECONDS
        )
        self.inference = histogram(
            "batch_seconds", "How long the model took for a batch, copies included.", _SECONDS
        )
        steps = counter("steps_total", "Environment steps; reset steps are none.", "role")
        episodes = counter("episodes_total", "Finished episodes.", "role")
        self.steps = {role: Tally(steps.labels(role)) for role in _ROLES}
        self.episodes = {role: Tally(episodes.labels(role)) for role in _ROLES}
        self.chunks_published = Tally(
            counter("chunks_published_total", "Chunk messages that NATS acknowledged.")
        )
        self.publish_retries = counter(
            "publish_retries_total",
            "Publishing a chunk message again, the queue being full or NATS away.",
            "reason",
        )
        self.withheld = SpentCounter(
            "seedrl_inference_withheld_seconds_total",
            "Time for which groups had to wait for their chunks to leave.",
            registry,
        )
        self.discarded_steps = Tally(
            counter("discarded_steps_total", "Environment steps in chunks that will not be published.")
        )
        self.refused_messages = counter(
            "refused_messages_total", "Messages of actors that ended their stream.", "reason"
        )
        self.refused_connections = counter(
            "refused_connections_total",
            "Calls without the token, and connections without TLS.",
            "reason",
        )
        self.refused_weights = counter("refused_weights_total", "Weights that are not of this run's network.")
        self.weights_refused = gauge("weights_refused", "1 while the newest weights are refused.")
        self.streams = gauge("streams", "Groups of environments connected.")
        self.environments = gauge("environments", "Environments connected.")
        self.queued_publishes = gauge("queued_publishes", "Chunks waiting to be published.")
        self.weights_version = gauge("weights_version", "Version of the weights in use.")
        self.weights_update = gauge("weights_update", "The learner's update count of the weights in use.")
        for reason in REASONS:
            self.refused_messages.labels(reason)
        for why in ("token", "tls", "plaintext"):
            self.refused_connections.labels(why)
        for cause in ("full", "connection"):
            self.publish_retries.labels(cause)
