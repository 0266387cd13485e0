"""What a person watching a run sees."""

import io

from rich.console import Console

from services.local.display import doing, headline, services_table


def shown(*rows: dict[str, object]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(services_table(rows, title="run x"))
    return console.export_text()


def test_the_table_has_the_columns_that_are_known() -> None:
    text = shown({"service": "learner", "restarts": 2, "doing": "training"})
    assert "restarts" in text
    assert "training" in text
    assert "restarts" not in shown({"service": "learner", "doing": "training"})


def test_waiting_comes_first() -> None:
    assert doing("learner", {"waiting": ["weights", "actors"]}) == "waiting for weights, actors"


def test_an_actor_is_described_by_what_inference_sees_of_it() -> None:
    status = {"groups": 2, "environments": 16, "steps": 1234}
    assert doing("actor", status) == "2 groups, 16 environments, 1,234 steps"
    assert doing("actor-0", {}) == ""
    replay = {"items": 1200, "steps": 24000, "limiter": "free"}
    assert doing("replay", replay) == "1,200 sequences, 24,000 steps inserted"
    held_back = {**replay, "limiter": "inserts wait: 5 more items to be sampled"}
    assert doing("replay", held_back).endswith("inserted; inserts wait: 5 more items to be sampled")


def test_the_headline_has_a_dash_for_what_is_not_known_yet() -> None:
    assert headline({}, total_steps=9).startswith("steps 0/9  0 steps/s")
    assert "return –" in headline({}, total_steps=9)
    assert "return 1.2" in headline({"mean_return_100": 1.25, "policy_lag": {"p99": 3}}, total_steps=9)
