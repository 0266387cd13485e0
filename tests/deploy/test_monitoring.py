"""Prometheus's own tools on what is shipped for it, and the real server on a real run."""

import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
OTHERS = {'up{job="inference", instance="i:8080"}': "1x80", 'up{job="actor", instance="a:8080"}': "1x80"}
# By alert: series with which it fires, and with which it does not (values as promtool has them, each 15 s).
GROWS, STANDS = "0+10x80", "10+0x80"
BURST = "0x30 20 40x50"  # much at once, and no more
SERIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "SeedrlNoProgress": (
        {'seedrl_learner_updates_total{instance="l"}': STANDS},
        {'seedrl_learner_updates_total{instance="l"}': GROWS},
    ),
    "SeedrlNoSteps": (
        {'seedrl_inference_steps_total{role="train",job="inference"}': STANDS},
        {'seedrl_inference_steps_total{role="train",job="inference"}': GROWS},
    ),
    "SeedrlServiceDown": ({f"up{UP}": "1x4 0x80", **OTHERS}, {f"up{UP}": "1x80", **OTHERS}),
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
            'seedrl_learner_chunks_total{outcome="refused_lag"}': BURST,
            'seedrl_learner_chunks_total{outcome="refused_lost"}': GROWS,
            'seedrl_learner_chunks_total{outcome="trained"}': GROWS,
        },
    ),
    "SeedrlChunksLost": (
        {'seedrl_learner_chunks_total{outcome="refused_lost"}': BURST},
        {
            'seedrl_learner_chunks_total{outcome="refused_lost"}': STANDS,
            'seedrl_learner_chunks_total{outcome="refused_lag"}': GROWS,
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
        {
            'seedrl_inference_refused_messages_total{reason="timeout"}': BURST,
            'seedrl_inference_refused_messages_total{reason="backlog"}': GROWS,
            'seedrl_inference_refused_messages_total{reason="full"}': GROWS,
            'seedrl_inference_refused_messages_total{reason="unavailable"}': GROWS,
        },
    ),
    "SeedrlRefusedConnections": (
        {'seedrl_inference_refused_connections_total{reason="token"}': GROWS},
        {'seedrl_inference_refused_connections_total{reason="token"}': STANDS},
    ),
    "SeedrlRefusedWeights": (
        {"seedrl_inference_weights_refused": "0x10 1x70"},
        {"seedrl_inference_weights_refused": "0x80"},
    ),
    "SeedrlEnvironmentsCrash": (
        {"seedrl_actor_environment_restarts_total": GROWS},
        {"seedrl_actor_environment_restarts_total": BURST},
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
    assert "15 rules found" in promtool_says("check", "config", PROMETHEUS / "prometheus.yml")
    promtool_says("check", "rules", PROMETHEUS / "alerts.yml")


def rules_hold(directory: Path, tests: Iterable[dict[str, Any]]) -> None:
    """Asserts what promtool's `tests` say of the rules."""
    file = directory / "tests.yml"
    content = {
        "rule_files": [str(PROMETHEUS / "alerts.yml")],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", **test} for test in tests],
    }
    file.write_text(json.dumps(content))
    promtool_says("test", "rules", file)


def fired(alert: str, series: Mapping[str, str], *, minutes: int = 15, expected: bool) -> dict[str, Any]:
    """A test that the alert fires after so many minutes, or, not `expected`, that it never did until then."""
    firing = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
    return {
        "name": f"{alert} {expected}",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"count({firing})" if expected else f"count_over_time({firing}[{minutes}m])",
                "eval_time": f"{minutes}m",
                "exp_samples": [{"value": 1}] if expected else [],
            }
        ],
    }


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    assert set(SERIES) == {rule["alert"] for rule in RULES}
    rules_hold(
        tmp_path,
        (
            fired(alert, series, expected=expected)
            for alert, both in SERIES.items()
            for series, expected in zip(both, (True, False), strict=True)
        ),
    )


@pytest.mark.parametrize("alert", ["SeedrlChunksRefused", "SeedrlEnvironmentsCrash", "SeedrlRefusedInput"])
def test_what_happens_now_and_then_raises_no_alert(alert: str, tmp_path: Path) -> None:
    (name,) = SERIES[alert][0]
    once, seldom, long_burst = "0x30 1x50", "0x9 1x10 2x10 3x10 4x10 5x30", "0x30 0+10x8 80x42"
    rules_hold(
        tmp_path, (fired(alert, {name: values}, expected=False) for values in (once, seldom, long_burst))
    )


def test_the_lag_that_r2d2_has_by_design_raises_no_alert(tmp_path: Path) -> None:
    (old, _) = SERIES["SeedrlPolicyLag"]
    of_r2d2 = {**old, 'seedrl_learner_sequences_total{instance="l"}': GROWS}
    rules_hold(tmp_path, [fired("SeedrlPolicyLag", of_r2d2, expected=False)])


SEQUENCES = {'seedrl_learner_sequences_total{instance="l"}': GROWS}
REPLAY = {'up{job="replay", instance="r:8080"}': "1x80"}


@pytest.mark.parametrize(
    ("series", "missed"),
    [
        ({**OTHERS, f"up{UP}": "1x20 _x60"}, "learner"),
        ({f"up{UP}": "1x80", 'up{job="inference", instance="i:8080"}': "1x20 _x60"}, "inference"),
        ({f"up{UP}": "1x80", **OTHERS, **SEQUENCES}, "replay"),
        ({f"up{UP}": "1x80", **OTHERS, **SEQUENCES, **REPLAY}, None),
        ({f"up{UP}": "1x80", **OTHERS, 'up{job="actor", instance="b:8080"}': "1x20 _x60"}, None),
    ],
)
def test_a_service_that_is_not_even_found_any_more_is_missed(
    series: dict[str, str], missed: str | None, tmp_path: Path
) -> None:
    rules_hold(tmp_path, [fired("SeedrlServiceDown", series, expected=missed is not None)])
    said = {
        "exp_labels": {"severity": "critical", "job": missed},
        "exp_annotations": {
            "summary": "A service does not answer.",
            "description": f"{missed} is gone: nothing has its name.",
        },
    }
    asked = {"alertname": "SeedrlServiceDown", "eval_time": "15m", "exp_alerts": [said] if missed else []}
    rules_hold(
        tmp_path,
        [
            {
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [asked],
            }
        ],
    )


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
