from typing import Any

import pytest

from services.learner.bottleneck import bottleneck


def says(work: float, input_: float, output: float, **more: Any) -> dict[str, Any]:
    return {"waiting": [], "activity": {"work": work, "input": input_, "output": output}, **more}


@pytest.mark.parametrize(
    ("learner", "inference", "replay", "processor", "words"),
    [
        (says(0, 1, 0), {**says(0, 1, 0), "waiting": ["actors"]}, None, 0.1, "inference waits for actors"),
        (says(0.97, 0.02, 0.01), says(0.3, 0.1, 0.6), None, 1.0, "learner: it works all the time"),
        (says(0.2, 0.8, 0), says(0.1, 0.9, 0), None, 0.4, "actors: inference waits for their observations"),
        (says(0.2, 0.8, 0), says(0.95, 0.05, 0), None, 0.5, "inference: the model works all the time"),
        (says(0.5, 0.5, 0), says(0.4, 0.6, 0), None, 0.99, "processor: all cores"),
        (says(0.1, 0.2, 0.7), says(0.1, 0.2, 0.7), None, 0.2, "learner: it waits for its accounts"),
        (says(0.6, 0.2, 0.2), says(0.2, 0.1, 0.7), None, 0.5, "learner: inference is held back"),
        (says(0.6, 0.3, 0.1), says(0.2, 0.1, 0.7, limiter="inserts wait"), says(0, 0, 1), 0.5, "replay: "),
        (says(0.1, 0.9, 0), says(0.06, 0.02, 0.92), None, 0.1, "NATS, or the way to it: chunks wait to be"),
        (says(0.03, 0.97, 0), says(0.06, 0.02, 0.92), None, 0.1, "NATS, or the way to it: chunks wait to be"),
        (says(0.03, 0.97, 0), says(0.06, 0.02, 0.92), says(0, 1, 0), 0.1, "NATS, or the way to it: "),
        (says(0.1, 0.9, 0), says(0.1, 0.5, 0.4), None, 0.1, "actors: "),
        (says(0, 1, 0), says(0, 1, 0, paused=True), None, 0.1, "paused: inference withholds"),
        (
            {**says(0, 1, 0), "waiting": ["NATS at x"]},
            says(0, 1, 0),
            None,
            0.1,
            "the learner waits for NATS at x",
        ),
    ],
)
def test_the_bottleneck_is_named(
    learner: dict[str, Any],
    inference: dict[str, Any],
    replay: dict[str, Any] | None,
    processor: float,
    words: str,
) -> None:
    said = bottleneck(learner, [inference], None if replay is None else [replay], processor)
    assert said.startswith(words), said


def test_of_several_inference_services_one_may_wait() -> None:
    waits, works = says(0, 1, 0, waiting=["actors"]), says(0.1, 0.9, 0)
    assert bottleneck(says(0.2, 0.8, 0), [waits, works], None, 0.4).startswith("actors: ")
    assert bottleneck(says(0, 1, 0), [waits, waits], None, 1.0) == "inference waits for actors"


def test_of_several_inference_services_the_one_that_is_held_back_is_looked_at() -> None:
    held, waits = says(0.1, 0.1, 0.8), says(0.1, 0.9, 0)
    assert bottleneck(says(0.1, 0.9, 0), [waits, held], None, 0.4).startswith("NATS, or the way to it: ")


def test_what_replay_waits_for_is_said_unless_another_replay_serves() -> None:
    learner, inference = says(0.1, 0.2, 0), says(0.2, 0.1, 0.7)
    waits = says(0, 1, 0, limiter=None) | {"waiting": ["the lease of the run's replay"]}
    serves = says(0, 1, 0, limiter="inserts wait")
    assert bottleneck(learner, [inference], [waits], 0.4) == "replay waits for the lease of the run's replay"
    assert "limiter: inserts wait" in bottleneck(learner, [inference], [waits, serves], 0.4)
    missing = {**inference, "waiting": ["actors"]}
    assert bottleneck(learner, [missing], [waits], 0.4) == "inference waits for actors"


def test_figures_stand_beside_the_words_and_silence_is_said() -> None:
    said = bottleneck(says(0.2, 0.8, 0), [says(0.1, 0.9, 0)], None, 0.4)
    assert "inference works 10%, waits for input 90%, for output 0%" in said
    assert "processor 40% busy" in said
    assert bottleneck(says(0, 1, 0), [], None, None) == "no inference service says anything"
    assert bottleneck(says(0, 1, 0), [says(0, 1, 0)], [], None) == "no replay service says anything"
