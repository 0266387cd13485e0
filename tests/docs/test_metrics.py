"""What docs/metrics.md says of the learner's metrics, its curves and summary.json is what the code writes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.learner.accounts import COMPLETED
from services.learner.curves import DIRECTORY, Curves
from services.learner.episodes import Episode
from services.learner.metrics import LearnerMetrics
from services.learner.r2d2 import R2D2Metrics
from services.learner.report import Report
from services.learner.rows import REASONS, Outcome
from services.learner.training import UpdateMetrics
from services.local.config import TrainConfig
from services.local.summary import write_summary
from shared.bus.work_queue import QueueState
from shared.specs import Agent
from tests.support.commands import ROOT

DOCUMENT = (ROOT / "docs/metrics.md").read_text()
AGENTS: tuple[Agent, ...] = get_args(Agent)
NAMES = {"vtrace": "V-trace", "r2d2": "R2D2"}
UPDATES = {kind: kind._make([1.0] * len(kind._fields)) for kind in (UpdateMetrics, R2D2Metrics)}


def section(title: str) -> str:
    """What stands below a heading of any depth, up to the next one."""
    (found,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return str(found)


def named(title: str, agent: Agent) -> set[str]:
    """The names in the first column of a section's table, in rows for this agent."""
    rows = re.findall(r"^\| (`.*?) \| (both|V-trace|R2D2) \|", section(title), re.MULTILINE)
    mine = [names for names, whose in rows if whose in ("both", NAMES[agent])]
    return {name for names in mine for name in re.findall(r"`([^`]+)`", names)}


def report(agent: Agent) -> Report:
    update = UPDATES[R2D2Metrics if agent == "r2d2" else UpdateMetrics]
    said = Report(nats="", agent=agent, update=update)  # type: ignore[arg-type]
    said.accounts.count([Outcome(1, None, 10, 2)])
    said.accounts.count_episodes([1.0])
    return said


@pytest.mark.parametrize("agent", AGENTS)
def test_the_learner_of_an_agent_has_the_metrics_that_are_marked_as_its_own(agent: Agent) -> None:
    families = list(LearnerMetrics(report(agent)).collect())
    has = {each.name + ("_total" if each.type == "counter" else "") for each in families}
    rows = re.findall(r"^\| `(seedrl_learner_\w+)` \|.*\| (?:(V-trace|R2D2): )?[^|]*\|$", DOCUMENT, re.M)
    assert has == {name for name, whose in rows if whose in ("", NAMES[agent])}


@pytest.mark.parametrize("agent", AGENTS)
def test_the_curves_are_those_of_the_table(agent: Agent, tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.write(100, report(agent).curves(), [Episode(10.0, 5)])
    curves.close()
    events = EventAccumulator(str(tmp_path / DIRECTORY)).Reload()
    assert set(events.Tags()["scalars"]) == named("Curves", agent)


def flat(content: dict[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else (name,)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_fields_of_the_summary_are_those_of_the_table(agent: Agent, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"env": "CartPole-v1", "run_dir": tmp_path, "agent": agent})
    written = write_summary(config, queue=QueueState(0, 0), discarded_steps=0, exit_reason="stopped")
    assert set(flat(written)) == named("summary.json", agent)
    for reason in REASONS:
        assert f"`{reason}`" in section("summary.json")


def test_the_reasons_for_an_end_are_those_that_the_code_gives() -> None:
    (cell,) = re.findall(r"^\| `exit_reason` \| both \| (.*) \|$", DOCUMENT, re.MULTILINE)
    said = {words.strip(" …") for words in re.findall(r"`([^`]+)`", cell)} - {"seedrl control stop"}
    assert said == {*COMPLETED, "stopped", "interrupted", "failed:"}
    command = (ROOT / "services/commands/train.py").read_text()
    assert '"interrupted"' in command
    assert 'f"failed: {' in command
    assert 'learner.end("stopped")' in (ROOT / "services/learner/service.py").read_text()
