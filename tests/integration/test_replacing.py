"""Inference and the learner replaced under training, one at a time, with nobody who looks after them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.addresses import free_port
from tests.support.single_services import Service, SingleServices

pytestmark = pytest.mark.timeout(180)

SAME = ("--preset", "cartpole")
BATCH_STEPS = 8 * 20
ON = 3000  # steps after which training is taken to go on


def learner(services: SingleServices) -> Service:
    words = ("--resume", "--total-steps", "100000000", "--checkpoint-seconds", "2")
    return services.start("learner", *SAME, *words)


class History:
    """What the learner said of itself, over its lives."""

    def __init__(self) -> None:
        self.learner: Service | None = None
        self.said: list[dict[str, Any]] = []

    @contextmanager
    def kept(self) -> Iterator["History"]:
        over = threading.Event()
        thread = threading.Thread(target=self._keep, args=(over,))
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _keep(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            status = self.learner.status() if self.learner is not None else {}
            if status.get("updates_per_second"):  # it trains
                self.said.append(status)

    def assert_goes_on(self) -> None:
        for name in ("steps", "updates", "episodes"):
            values = [status[name] for status in self.said]
            assert values == sorted(values), f"{name} ran backwards"
        returns = [status["mean_return_100"] for status in self.said]
        known = next(index for index, value in enumerate(returns) if value is not None)
        assert None not in returns[known:]
        # The mean of the last 100: without those from before it would be that of a few new ones.
        assert all(after > before / 2 for before, after in pairwise(returns[known:]))


def curve_steps(run_dir: Path, name: str) -> list[int]:
    """The steps of a curve's points over all lives of the learner, in the order of writing."""
    points = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        events = EventAccumulator(str(path)).Reload()
        points += [(point.wall_time, point.step) for point in events.Scalars(name)]
    return [step for _, step in sorted(points)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_training_goes_on_through_the_replacement_of_inference_and_learner(
    services: SingleServices, number: signal.Signals
) -> None:
    status = 0 if number is signal.SIGTERM else -number
    services.nats()
    history = History()
    first = history.learner = learner(services)
    inference = services.start("inference", *SAME)
    actors = [services.start("actor", "CartPole-v1", *SAME) for _ in range(2)]
    services.until_more_steps(ON)
    with history.kept():
        services.until_more_steps(ON)
        assert inference.end(number) == status
        inference = services.start("inference", *SAME)
        services.until(lambda: streams(inference) == 4, what="the actors' return")
        services.until_more_steps(ON)

        assert first.end(number) == status
        history.learner = learner(services)
        services.until_more_steps(ON)
    assert [actor.process.poll() for actor in actors] == [None, None]
    assert [actor.end() for actor in actors] == [0, 0]
    assert (inference.end(), history.learner.end()) == (0, 0)
    counts = services.assert_exact()
    history.assert_goes_on()
    steps = curve_steps(services.run_dir, "episodes/mean_return_100")
    assert max(before - after for before, after in pairwise(steps)) <= 3 * BATCH_STEPS
    assert len(list((services.run_dir / "tensorboard").iterdir())) == 2
    accounts = services.accounts()
    print(f"\n{counts}; redelivered {accounts.redelivered}, rolled back {accounts.rolled_back}")
    if number is signal.SIGTERM:
        assert accounts.rolled_back == 0


@pytest.mark.slow
def test_two_inference_services_serve_one_run_and_every_step_counts(services: SingleServices) -> None:
    services.nats()
    training = learner(services)
    pairs = []
    for _ in range(2):
        services.inference_url = f"127.0.0.1:{free_port()}"
        pairs.append((services.start("inference", *SAME), services.start("actor", "CartPole-v1", *SAME)))
    services.until(lambda: all(streams(inference) == 2 for inference, _ in pairs), what="both to serve")
    services.until_more_steps(ON)
    assert [actor.end() for _, actor in pairs] == [0, 0]
    acted = discarded = 0
    for inference, _ in pairs:
        services.until(lambda each=inference: is_quiet(each), what="all published")  # type: ignore[misc]
        last = inference.status()
        assert last["steps_total"] > ON / 4
        acted, discarded = acted + last["steps_total"], discarded + last["discarded_steps"]
        assert inference.end() == 0
    assert training.end() == 0
    services.assert_exact(acted=acted, discarded=discarded)


def streams(inference: Service) -> int:
    return len(inference.status().get("streams", ()))


def is_quiet(inference: Service) -> bool:
    status = inference.status()
    return not status["streams"] and not status["queued_publishes"]
