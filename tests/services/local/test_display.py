"""What a person watching a run sees."""

import io

import pytest
from rich.console import Console

from services.learner.bottleneck import bottleneck as named
from services.local.display import (
    Standstill,
    Status,
    actor_doing,
    actors_in_trouble,
    bottleneck,
    doing,
    headline,
    progress_line,
    services_table,
)
from services.local.watching import ActorAccount


def shown(*rows: dict[str, object]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(services_table(rows, title="run x"))
    return console.export_text()


def test_the_table_has_the_columns_that_are_known() -> None:
    text = shown({"service": "learner", "restarts": 2, "doing": "training"})
    assert "restarts" in text
    assert "training" in text
    assert "restarts" not in shown({"service": "learner", "doing": "training"})


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    words = "at last with OSError: cannot open [/dev/input/js0] or [bold]"
    assert words in shown({"service": "actor-0", "doing": words})


def test_waiting_comes_first() -> None:
    assert doing("learner", {"waiting": ["weights", "actors"]}) == "waiting for weights, actors"


def test_inference_is_described_by_its_actors() -> None:
    actor = {"groups": 2, "environments": 16, "steps": 1234}
    status = {"actors": {"a": actor, "b": actor}, "steps_per_second": 1200.0}
    assert doing("inference", status) == "4 streams, 32 environments, 1,200 steps/s"
    assert doing("inference", {"steps_per_second": 0.0}) == "0 streams, 0 environments, 0 steps/s"


def test_an_actor_is_described_by_what_inference_sees_of_it() -> None:
    status = {"groups": 2, "environments": 16, "steps": 1234}
    assert doing("actor", status) == "2 groups, 16 environments, 1,234 steps"
    assert doing("learner", {}) == "starting"
    replay = {"items": 1200, "steps": 24000, "limiter": "free"}
    assert doing("replay", replay) == "1,200 sequences, 24,000 steps received"
    held_back = {**replay, "limiter": "inserts wait: 5 more items to be sampled"}
    assert doing("replay", held_back).endswith("received; inserts wait: 5 more items to be sampled")


def crashing() -> ActorAccount:
    account = ActorAccount(0.0)
    status = {"waiting_for": [], "making_environments": False}
    account.answered({**status, "replaced_environments": 1200, "last_crash": "NotFinite: reward"}, 0.0)
    return account


def test_an_actor_speaks_for_itself_until_it_is_connected_and_of_its_crashes_always() -> None:
    seen = {"groups": 2, "environments": 16, "steps": 1234}
    assert actor_doing(None, ActorAccount(5.0), 39.0) == "starting for 34 s"
    assert actor_doing(seen, ActorAccount(5.0), 39.0) == doing("actor", seen)
    crashes = "1,200 crashed environments replaced, at last with NotFinite: reward"
    assert actor_doing(seen, crashing(), 39.0) == f"{doing('actor', seen)}; {crashes}"


def test_one_line_names_the_first_actors_that_are_in_trouble_and_counts_the_others() -> None:
    accounts = {f"actor-{i}": ActorAccount(0.0) for i in range(6)} | {"actor-1": crashing()}
    seen: dict[str, dict[str, int]] = {"actor-0": {}, "actor-1": {}}
    assert actors_in_trouble(seen, accounts, 9.0) == [
        "actor-1: 1,200 crashed environments replaced, at last with NotFinite: reward",
        "actor-2: starting for 9 s",
        "actor-3: starting for 9 s",
        "2 more actors like that",
    ]
    assert actors_in_trouble(accounts.fromkeys(accounts, {}), {"actor-0": accounts["actor-0"]}, 9.0) == []


def test_the_headline_has_a_dash_for_what_is_not_known_yet() -> None:
    assert headline({}, total_steps=9).startswith("steps 0/9  0 steps/s")
    assert "return –" in headline({}, total_steps=9)
    assert "no episode has ended yet" in headline({"updates": 1, "mean_return_100": None}, total_steps=9)
    assert "return 1.2" in headline({"mean_return_100": 1.25, "policy_lag": {"p99": 3}}, total_steps=9)


def test_the_bottleneck_has_a_name_and_with_its_figures_a_sentence() -> None:
    words = "processor: all cores of the learner's machine are busy (learner works 40%)"
    assert bottleneck({"bottleneck": words}, figures=True) == f"bottleneck: {words}"
    assert bottleneck({"bottleneck": words}, figures=False) == "bottleneck: processor"
    assert bottleneck({}, figures=True) == ""


@pytest.mark.parametrize(
    ("learner", "inference"),
    [
        (["NATS at nats://127.0.0.1:4222"], []),
        (["its journal (cannot write the accounts /runs/x/accounts.json: No space left on device)"], []),
        ([], ["NATS to keep chunks (the work queue: insufficient storage resources available)"]),
    ],
)
def test_the_reason_of_a_wait_is_said_without_figures_too(learner: list[str], inference: list[str]) -> None:
    words = named({"waiting": learner}, [{"waiting": inference}], None, 0.5)
    assert words.endswith((*learner, *inference)[0])
    assert bottleneck({"bottleneck": words}, figures=False) == f"bottleneck: {words}"


def line(learner: Status, *trouble: str) -> str:
    statuses: dict[str, Status] = {
        "inference": {"waiting": ["weights"]},
        "replay": {"limiter": "samples wait: 3 of 9 items"},
        "learner": learner,
    }
    return progress_line(statuses, total_steps=9000, trouble=trouble)


def test_before_it_trains_a_run_says_what_everybody_waits_for_and_how_far_it_is() -> None:
    replay = "replay: 0 sequences, 0 steps received; samples wait: 3 of 9 items"
    assert line({}) == f"inference: waiting for weights; {replay}; learner: starting"
    waits = {"waiting": ["sequences"], "bottleneck": "the learner waits for sequences"}
    said = line({"steps": 1200, "updates": 0, **waits}, "actor-0: trouble")
    assert said.startswith("steps 1,200/9,000  ")
    assert "  bottleneck: the learner waits for sequences; actor-0: trouble; inference: " in said
    assert said.endswith("; learner: waiting for sequences")


def test_while_it_trains_a_run_says_how_fast_and_what_the_trouble_is() -> None:
    learner = {"steps": 1200, "updates": 4, "bottleneck": "paused: inference withholds all"}
    assert line(learner, "actor-1 died once").endswith("  bottleneck: paused; actor-1 died once")


def test_a_run_that_stands_still_says_what_is_waited_for() -> None:
    statuses: dict[str, Status] = {
        "inference": {"waiting": ["NATS to keep chunks (the work queue: no space left)"]},
        "replay": {"limiter": "free"},
        "learner": {"steps": 1200, "updates": 4, "waiting": ["trajectories"]},
    }
    moving = progress_line(statuses, total_steps=9000, trouble=())
    still = progress_line(statuses, total_steps=9000, trouble=(), stands_still=True)
    reason = "NATS to keep chunks (the work queue: no space left)"
    assert still == f"{moving}; inference: waiting for {reason}; learner: waiting for trajectories"


def test_a_standstill_begins_with_the_last_step_and_ends_with_the_next() -> None:
    standstill = Standstill()
    assert standstill.seconds(None, 50.0) == 0.0
    assert [standstill.seconds(9, at) for at in (60.0, 70.0)] == [0.0, 10.0]
    assert standstill.seconds(None, 72.0) == 12.0
    assert [standstill.seconds(10, at) for at in (75.0, 76.0)] == [0.0, 1.0]


def test_a_service_that_has_fallen_silent_is_named_instead_of_its_old_figures() -> None:
    assert line({"silent_seconds": 12.3}).endswith("; learner: has said nothing for 12 s")
    statuses: dict[str, Status] = {
        "inference": {"silent_seconds": 7.0},
        "learner": {"steps": 9, "updates": 1},
    }
    said = progress_line(statuses, total_steps=9000, trouble=())
    assert said.startswith("steps 9/9,000  ")
    assert said.endswith("; inference: has said nothing for 7 s")
