"""What the learner says of itself."""

import re
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from services.learner.metrics import LearnerMetrics
from services.learner.report import Report
from services.learner.rows import Outcome
from services.learner.training import UpdateMetrics
from shared.bus.work_queue import QueueState
from tests.support.promtool import assert_clean_metrics

UPDATE = UpdateMetrics(
    total_loss=1.0,
    policy_loss=2.0,
    baseline_loss=3.0,
    entropy_loss=-0.5,
    entropy=0.7,
    value=0.1,
    target=0.2,
    rho=float("inf"),
    reward=0.3,
    gradient_norm=4.0,
    learning_rate=6e-4,
)


def make_report() -> Report:
    report = Report(nats="nats://here:4222", is_connected=lambda: True, update=UPDATE)
    report.accounts.updates = 7
    report.accounts.count([Outcome(1, None, 10, 2, True), Outcome(2, "spec", 5), Outcome(3, None, 10, 4)])
    report.accounts.count_episodes([1.0, 2.0])
    report.queue = QueueState(last_sequence=5, messages=2)
    return report


def test_steps_and_updates_are_told_once_no_crash_takes_them_back() -> None:
    report = make_report()
    report.journaled = lambda: (15, 6)  # the journal cannot be written at the moment
    status = report.status()
    assert (status["steps"], status["updates"]) == (15, 6)
    registry = CollectorRegistry()
    registry.register(LearnerMetrics(report))
    assert registry.get_sample_value("seedrl_learner_steps_total") == 15
    assert registry.get_sample_value("seedrl_learner_updates_total") == 6


def test_the_status_has_the_names_of_the_summary_and_the_newest_update() -> None:
    status = make_report().status()
    assert (status["steps"], status["updates"], status["episodes"], status["mean_return_100"]) == (
        25,
        7,
        2,
        1.5,
    )
    assert status["policy_lag"] == {"p50": 2, "p99": 4, "max": 4}
    assert status["chunks"]["published"] == 5
    assert status["chunks"]["trained"] + status["chunks"]["refused"] + status["chunks"]["queued"] == 5
    assert (status["loss"], status["gradient_norm"], status["learning_rate"]) == (1.0, 4.0, 6e-4)
    assert (status["waiting"], status["exit_reason"]) == ([], None)


def test_before_the_first_update_the_status_holds_no_losses() -> None:
    status = Report(nats="").status()
    assert status["loss"] is None
    assert status["mean_return_100"] is None
    assert status["policy_lag"] == {"p50": None, "p99": None, "max": None}


def test_what_is_awaited_is_said_in_words() -> None:
    report = Report(nats="nats://here:4222", awaited=["the run's spec"])
    assert report.waiting() == ["NATS at nats://here:4222", "the run's spec"]
    report.is_connected = lambda: True
    assert report.waiting() == ["the run's spec"]
    report.weights_trouble = lambda: "weights: no answer in time"
    assert report.waiting() == ["NATS to take weights (weights: no answer in time)", "the run's spec"]
    report.is_connected = lambda: False
    assert report.waiting() == ["NATS at nats://here:4222", "the run's spec"]


def test_a_learner_that_starves_is_ready_and_says_so() -> None:
    report = make_report()
    report.starved_seconds = 3.0
    assert report.waiting() == []
    assert report.status()["waiting"] == ["trajectories"]


def test_an_update_is_work_while_it_goes_on() -> None:
    report = make_report()
    report.training_since = time.monotonic() - 50.0  # it was stopped for most of that
    report.sample(1.0)
    assert report.activity.shares()["work"] > 0.99
    report.training_seconds, report.training_since = 50.0, None
    report.sample(2.0)
    assert report.activity.totals().work == 50.0


def test_a_wait_for_a_batch_counts_while_it_goes_on_and_only_once() -> None:
    report = make_report()
    report.waiting_since = 100.0
    report.sample(100.0)
    for now in range(101, 121):
        report.sample(now)
        assert report.status()["waiting_share"] == report.curves()["speed/waiting_share"] == 1.0
    report.waited(until=120.0)
    report.training_since = 120.0
    for now in range(121, 141):
        report.sample(now)
    assert report.status()["waiting_share"] == pytest.approx(10 / 30)  # of the last half minute
    assert report.status()["training_share"] == pytest.approx(20 / 30)
    assert report.waiting_seconds == 20.0


def test_speeds_come_from_the_samples() -> None:
    report = make_report()
    report.sample(1.0)
    report.accounts.steps += 100
    report.training_seconds += 0.5
    report.sample(2.0)
    status = report.status()
    assert (status["steps_per_second"], status["training_share"]) == (100.0, 0.5)


def test_the_metrics_are_clean_and_say_what_the_accounts_say() -> None:
    registry = CollectorRegistry()
    registry.register(LearnerMetrics(make_report()))
    text = generate_latest(registry).decode()
    assert 'seedrl_learner_chunks_total{outcome="trained"} 2.0' in text
    assert 'seedrl_learner_chunks_total{outcome="refused_spec"} 1.0' in text
    assert "seedrl_learner_steps_total 25.0" in text
    assert 'seedrl_learner_policy_lag_updates_bucket{le="1.0"} 0.0' in text
    assert 'seedrl_learner_policy_lag_updates_bucket{le="2.0"} 1.0' in text
    assert "seedrl_learner_policy_lag_updates_sum 6.0" in text
    assert "seedrl_learner_entropy 0.7" in text
    assert_clean_metrics(text)


def test_the_lag_has_buckets_for_thousands_of_updates() -> None:
    report = make_report()
    report.accounts.count([Outcome(4, None, 10, lag) for lag in (0, 1, 3000, 65536, 65537, 10**6)])
    registry = CollectorRegistry()
    registry.register(LearnerMetrics(report))
    text = generate_latest(registry).decode()
    said = re.findall(r'^seedrl_learner_policy_lag_updates_bucket{le="(.*)"} (.*)$', text, re.M)
    below = {bound: float(count) for bound, count in said}
    known = (0, 1, 2, 4, 3000, 65536, 65537, 10**6)
    assert below == {bound: sum(lag <= float(bound) for lag in known) for bound in below}
    assert (below["2048.0"], below["4096.0"], below["131072.0"], below["+Inf"]) == (4, 5, 7, 8)
    assert_clean_metrics(text)


def test_the_metrics_of_a_learner_that_still_waits_are_clean() -> None:
    registry = CollectorRegistry()
    registry.register(LearnerMetrics(Report(nats="")))
    assert_clean_metrics(generate_latest(registry).decode())
