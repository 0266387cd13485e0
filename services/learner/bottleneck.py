"""What holds a run up, in words with the figures; pure: the services' own statuses in, one line out.

Everything is bounded by something. Whoever works all the time is it; whoever waits for input points before
itself, whoever waits for its output to be taken points behind itself.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

Status = Mapping[str, Any]

WAITS = " waits for "  # in words that name what somebody waits for, with the reason, and have no figures
QUEUE_ROOM = "room in the work queue"  # of what inference may wait for, nothing that is missing
_BUSY = 0.9
_PROCESSOR_BUSY = 0.95


def bottleneck(
    learner: Status,
    inferences: Sequence[Status],
    replays: Sequence[Status] | None,
    processor: float | None,
) -> str:
    """From statuses with `waiting` and `activity`, and the busy share of the processor.

    replays: None for a run without replay.
    """
    if learner.get("waiting"):
        return f"the learner waits for {', '.join(learner['waiting'])}"
    if not inferences:
        return "no inference service says anything"
    if replays is not None and not replays:
        return "no replay service says anything"
    if any(inference.get("paused") for inference in inferences):
        return "paused: inference withholds all actions (seedrl control resume)"
    awaited = set.intersection(*(set(each.get("waiting", ())) for each in inferences)) - {QUEUE_ROOM}
    if awaited:
        return f"inference waits for {', '.join(sorted(awaited))}"
    sampled = [replay for replay in replays or () if not replay.get("waiting")]
    if replays and not sampled:  # which the learner and inference only notice by what does not come or go
        return f"replay waits for {', '.join(replays[0]['waiting'])}"
    acting = [_shares(each) for each in inferences]
    said = _figures([("learner", _shares(learner)), *(("inference", each) for each in acting)], processor)
    training, fullest = _shares(learner), max(acting, key=itemgetter("output"))
    held, working = fullest["output"], max(each["work"] for each in acting)
    if training["work"] >= _BUSY:
        return f"learner: it works all the time, and what comes waits for it ({said})"
    if training["output"] > max(training["work"], training["input"]):
        return f"learner: it waits for its accounts and for NATS to take what it publishes ({said})"
    if processor is not None and processor >= _PROCESSOR_BUSY:
        return f"processor: all cores of the learner's machine are busy ({said})"
    if working >= _BUSY:
        return f"inference: the model works all the time ({said})"
    if sampled and held > training["input"]:
        limiter = sampled[0].get("limiter")
        return f"replay: it takes no more until more is sampled; limiter: {limiter} ({said})"
    has_time = training["input"] > training["work"]
    if held > max(training["input"], working) and not has_time:
        return f"learner: inference is held back, since the queue is full ({said})"
    if held > fullest["input"]:
        return f"NATS, or the way to it: chunks wait to be kept although the learner has time ({said})"
    return f"actors: inference waits for their observations; more actors would help ({said})"


def _shares(status: Status) -> dict[str, float]:
    return {"work": 0.0, "input": 0.0, "output": 0.0, **(status.get("activity") or {})}


def _figures(named: Sequence[tuple[str, Mapping[str, float]]], processor: float | None) -> str:
    parts = [
        f"{name} works {shares['work']:.0%}, waits for input {shares['input']:.0%}, for output "
        f"{shares['output']:.0%}"
        for name, shares in named
    ]
    return "; ".join([*parts, *([] if processor is None else [f"processor {processor:.0%} busy"])])
