"""Prometheus's own tools on what is shipped for it, and the real server on a real run."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.local_run import training
from tests.support.metrics import all_metrics
from tests.support.prometheus import DEPLOYED as PROMETHEUS
from tests.support.prometheus import running_prometheus
from tests.support.promtool import promtool

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/seedrl.json"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]

UP = '{job="learner", instance="l:8080"}'
# By alert: series with which it fires, and with which it does not (values as promtool has them, each 15 s).
GROWS, STANDS = "0+10x80", "10+0x80"
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "SeedrlNoProgress": (
        {'seedrl_learner_updates_total{instance="l"}': STANDS},
        {'seedrl_learner_updates_total{instance="l"}': GROWS},
    ),
    "SeedrlNoSteps": (
        {'seedrl_inference_steps_total{role="train",job="inference"}': STANDS},
        {'seedrl_inference_steps_total{role="train",job="inference"}': GROWS},
    ),
    "SeedrlServiceDown": ({f"up{UP}": "1x4 0x80"}, {f"up{UP}": "1x80"}),
    "SeedrlRestarts": (
        {f"process_start_time_seconds{UP}": "1x10 2x10 3x10 4x60"},
        {f"process_start_time_seconds{UP}": "1x40 2x40"},
    ),
    "SeedrlQueueFull": (
        {'seedrl_inference_activity_seconds_total{activity="output"}': "0+12x80"},
        {'seedrl_inference_activity_seconds_total{activity="output"}': "0+1x80"},
    ),
    "SeedrlChunksRefused": (
        {'seedrl_learner_chunks_total{outcome="refused_lag"}': GROWS},
        {
            'seedrl_learner_chunks_total{outcome="refused_lag"}': STANDS,
            'seedrl_learner_chunks_total{outcome="trained"}': GROWS,
        },
    ),
    "SeedrlPolicyLag": (
        {
            'seedrl_learner_policy_lag_updates_bucket{le="16.0",instance="l"}': "0+1x80",
            'seedrl_learner_policy_lag_updates_count{instance="l"}': GROWS,
        },
        {
            'seedrl_learner_policy_lag_updates_bucket{le="16.0",instance="l"}': "0+9x80",
            'seedrl_learner_policy_lag_updates_count{instance="l"}': GROWS,
        },
    ),
    "SeedrlRefusedInput": (
        {'seedrl_inference_refused_messages_total{reason="garbage"}': GROWS},
        {'seedrl_inference_refused_messages_total{reason="garbage"}': STANDS},
    ),
    "SeedrlRefusedConnections": (
        {'seedrl_inference_refused_connections_total{reason="token"}': GROWS},
        {'seedrl_inference_refused_connections_total{reason="token"}': STANDS},
    ),
    "SeedrlRefusedWeights": (
        {"seedrl_inference_refused_weights_total": GROWS},
        {"seedrl_inference_refused_weights_total": STANDS},
    ),
    "SeedrlEnvironmentsCrash": (
        {"seedrl_actor_environment_restarts_total": GROWS},
        {"seedrl_actor_environment_restarts_total": STANDS},
    ),
    "SeedrlReplayRefusals": (
        {
            'seedrl_replay_refused_priorities_total{reason="not_finite"}': GROWS,
            "seedrl_replay_refused_requests_total": STANDS,
        },
        {
            'seedrl_replay_refused_priorities_total{reason="evicted"}': GROWS,
            'seedrl_replay_refused_priorities_total{reason="not_finite"}': STANDS,
            "seedrl_replay_refused_requests_total": STANDS,
        },
    ),
    "SeedrlCheckpointsFail": (
        {"seedrl_learner_checkpoint_failures_total": "0x50 1x30"},
        {"seedrl_learner_checkpoint_failures_total": STANDS},
    ),
    "SeedrlSnapshotsFail": (
        {"seedrl_replay_snapshot_failures_total": "0x50 1x30"},
        {"seedrl_replay_snapshot_failures_total": STANDS},
    ),
}


def promtool_says(*words: str | Path) -> str:
    result = subprocess.run([promtool(), *map(str, words)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_what_is_shipped_is_valid() -> None:
    assert "14 rules found" in promtool_says("check", "config", PROMETHEUS / "prometheus.yml")
    promtool_says("check", "rules", PROMETHEUS / "alerts.yml")


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    assert set(SERIES) == {rule["alert"] for rule in RULES}
    tests = []
    for alert, both in SERIES.items():
        for series, fires in zip(both, (True, False), strict=True):
            tests.append(
                {
                    "name": f"{alert} {fires}",
                    "interval": "15s",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                            "eval_time": "15m",
                            "exp_samples": [{"value": 1}] if fires else [],
                        }
                    ],
                }
            )
    file = tmp_path / "tests.yml"
    file.write_text(
        json.dumps(
            {
                "rule_files": [str(PROMETHEUS / "alerts.yml")],
                "evaluation_interval": "15s",
                "tests": tests,
            }
        )
    )
    promtool_says("test", "rules", file)


def names_in(text: str) -> set[str]:
    """Names of our metrics in queries or words."""
    return set(re.findall(r"seedrl_(?:actor|inference|learner|replay)_\w+", text))


def expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_only_metrics_that_there_are_are_asked_for_and_all_are_documented() -> None:
    known = all_metrics()
    asked = names_in(" ".join(expressions())) | names_in(" ".join(rule["expr"] for rule in RULES))
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= set(known)
    documented = set(re.findall(r"^\| `(seedrl_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert documented == set(known)
    alerts = set(re.findall(r"^\| (Seedrl\w+) ", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert alerts == set(SERIES)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["vtrace", "r2d2"])
def test_every_query_of_the_dashboard_has_data_from_a_run(agent: str, tmp_path: Path) -> None:
    is_r2d2 = agent == "r2d2"
    words = ("CartPole-v1", "--preset", "cartpole_r2d2" if is_r2d2 else "cartpole", "--actors", "2")
    with (
        running_prometheus(tmp_path / "prometheus") as prometheus,
        training(*words, "--total-steps", "100000000", directory=tmp_path / "run", cwd=tmp_path) as run,
    ):
        run.until_steps(8000, seconds=90)
        prometheus.watch(run.http_addresses())
        prometheus.until_data("up == 1", 5 if is_r2d2 else 4)
        for expression in expressions():
            if is_r2d2 or "seedrl_replay" not in expression:
                prometheus.until_data(expression)
        run.end()
