"""What the inference service says of itself at /status, on NATS and to who asks for readiness."""

from collections import deque
from time import monotonic
from typing import Any

from services.inference.agreement import Agreement
from services.inference.chunk_publisher import ChunkPublisher
from services.inference.metrics import InferenceMetrics
from services.inference.pause import Pause
from services.inference.streams import Stream, Streams
from shared.activity import Activity
from shared.bus.connection import Bus
from shared.bus.statuses import NATS_KEEPS_NOTHING

_RATE_SECONDS = 10.0
_WITHHELD_SECONDS = 2.0  # after which backpressure is something to wait for, not the usual give and take


class Rate:
    """Growth of a counter per second over the last seconds; samples and their times are passed in."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, now: float, total: float) -> None:
        """Takes the counter's value at `now`."""
        self._samples.append((now, total))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_SECONDS:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """0.0 before there are two samples."""
        if len(self._samples) < 2:
            return 0.0
        (then, before), (now, after) = self._samples[0], self._samples[-1]
        return (after - before) / (now - then) if now > then else 0.0


class Report:
    """Gathers the figures; `sample` is called each second for the speed."""

    def __init__(
        self,
        bus: Bus,
        agreement: Agreement,
        streams: Streams,
        publisher: ChunkPublisher,
        metrics: InferenceMetrics,
        pause: Pause,
    ) -> None:
        self.ending: str | None = None  # why the service ends
        self.refused_weights = ""  # why the newest ones are not this run's
        self.unread_weights = ""  # why they cannot be read
        self._bus = bus
        self._agreement = agreement
        self._streams = streams
        self._publisher = publisher
        self._metrics = metrics
        self._pause = pause
        self._speed = Rate()
        self._activity = Activity("inference", metrics.model.seconds, metrics.held.seconds)
        metrics.registry.register(self._activity)

    def sample(self) -> None:
        """Takes the totals of this moment."""
        self._activity.sample()
        self._speed.add(monotonic(), self._metrics.steps["train"].total)

    def weights_unread(self, reason: str) -> None:
        """The newest weights cannot be read, for this reason; empty: nothing is wrong with them."""
        self.unread_weights = reason

    def not_ready(self) -> list[str]:
        """What must come before a Hello is accepted; empty when it is."""
        if self.ending:
            return [self.ending]
        return [] if self._agreement.engine or self._bus.is_connected else [self._nats]

    def waiting(self) -> list[str]:
        """What must come before actions are given; empty when nothing must."""
        engine = self._agreement.engine
        waiting = [] if self._bus.is_connected else [self._nats]
        if self._pause.is_on:
            waiting.append("resume (the run is paused)")
        if not self._streams.live:
            waiting.append("actors")
        if engine and not engine.weights_version:
            refused = self.refused_weights and f"refused: {self.refused_weights}"
            reason = self.unread_weights or refused
            waiting.append(f"weights ({reason})" if reason else "weights")
        training = [stream for stream in self._streams.live if not stream.group.greedy]
        if training and all(map(_is_held_back, training)):
            trouble = self._publisher.trouble
            waiting.append(f"{NATS_KEEPS_NOTHING} ({trouble})" if trouble else "room in the work queue")
        return waiting

    def status(self) -> dict[str, Any]:
        """The service's /status."""
        engine, metrics = self._agreement.engine, self._metrics
        now = monotonic()
        return {
            "waiting": self.waiting(),
            "paused": self._pause.is_on,
            "activity": self._activity.shares(),
            "weights_version": engine.weights_version if engine else 0,
            "weights_update": engine.weights_update if engine else 0,
            "network": engine.spec.network.name if engine else None,
            "steps_total": metrics.steps["train"].total,
            "eval_steps_total": metrics.steps["eval"].total,
            "steps_per_second": round(self._speed.per_second, 1),
            "episodes": {role: tally.total for role, tally in metrics.episodes.items()},
            "discarded_steps": metrics.discarded_steps.total,
            "batches": metrics.batches.total,
            "rows_per_batch": round(metrics.rows.total / max(metrics.batches.total, 1), 2),
            "chunks_published": metrics.chunks_published.total,
            "queued_publishes": self._publisher.queued,
            "actors": self._actors(),
            "streams": [_stream(stream, now) for stream in self._streams.live],
        }

    @property
    def _nats(self) -> str:
        return f"NATS at {self._bus.address}"

    def _actors(self) -> dict[str, dict[str, int]]:
        """By actor id, of the streams that are connected now."""
        actors: dict[str, dict[str, int]] = {}
        for stream in self._streams.live:
            group = stream.group
            actor = actors.setdefault(
                group.introduction.actor_id, {"groups": 0, "environments": 0, "steps": 0}
            )
            actor["groups"] += 1
            actor["environments"] += group.rows
            actor["steps"] += group.steps
        return actors


def _is_held_back(stream: Stream) -> bool:
    since = stream.withheld_since
    return since is not None and monotonic() - since > _WITHHELD_SECONDS


def _stream(stream: Stream, now: float) -> dict[str, Any]:
    introduction = stream.group.introduction
    last = stream.last_step_at
    return {
        "stream_id": introduction.stream_id,
        "actor_id": introduction.actor_id,
        "task": introduction.task,
        "role": introduction.role,
        "rows": introduction.group_size,
        "shared_memory": stream.group.shares_memory,
        "pipes": stream.pipes is not None,
        "steps": stream.group.steps,
        "seconds_since_step": None if last is None else round(now - last, 3),
        "withheld": stream.withheld_since is not None,
    }
