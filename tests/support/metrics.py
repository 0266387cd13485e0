"""All metrics of all services, as they register them."""

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from services.actor.metrics import ActorMetrics
from services.inference.metrics import InferenceMetrics
from services.learner.metrics import LearnerMetrics
from services.learner.r2d2 import R2D2Metrics
from services.learner.report import Report as LearnerReport
from services.learner.training import UpdateMetrics
from services.replay.metrics import ReplayMetrics, ReportMetrics
from services.replay.report import Report as ReplayReport
from shared.activity import Activity


def all_metrics() -> dict[str, Metric]:
    """By the name that a query says."""
    registry = CollectorRegistry()
    ActorMetrics(registry)
    registry.register(Activity("actor", lambda: 0.0))
    registry.register(Activity("inference", lambda: 0.0))
    InferenceMetrics(registry)
    ReplayMetrics(registry)
    registry.register(ReportMetrics(ReplayReport(nats="")))
    families = list(registry.collect())
    for update in (UpdateMetrics, R2D2Metrics):
        report = LearnerReport(nats="", agent="r2d2" if update is R2D2Metrics else "vtrace")
        report.update = update._make([0.0] * len(update._fields))
        report.accounts.count_episodes([1.0])
        families += LearnerMetrics(report).collect()
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
