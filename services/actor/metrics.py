"""Prometheus metrics of the actor."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shared.activity import Spent, SpentCounter

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class ActorMetrics:
    """Registered on the registry that is passed in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stepping = Spent()  # summed over groups, as is the next
        self.sending = Spent()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"seedrl_actor_{name}", text, registry=registry)

        self.steps = counter("steps_total", "Environment steps; reset steps are none.")
        self.reset_steps = counter(
            "reset_steps_total", "Steps whose action was ignored, as the environment was reset."
        )
        self.episodes = counter("episodes_total", "Episodes that came to their end.")
        self.environment_restarts = counter(
            "environment_restarts_total", "Crashed environments that were replaced by new ones."
        )
        self.reconnections = counter("reconnections_total", "Streams opened after a group's first one.")
        self.rejected_steps = counter("rejected_steps_total", "Steps that inference rejected as invalid.")
        self.action_wait = SpentCounter(
            "seedrl_actor_action_wait_seconds_total",
            "Time from sending observations to their actions, summed over groups.",
            registry,
        )
        self.step_seconds = Histogram(
            "seedrl_actor_step_seconds", "How long a group's step took.", buckets=_SECONDS, registry=registry
        )
        self.groups = Gauge("seedrl_actor_groups", "Groups of environments.", registry=registry)
        self.groups_connected = Gauge(
            "seedrl_actor_groups_connected", "Groups that inference has welcomed.", registry=registry
        )
