"""Services on hosts of their own, which lose each other without a word: packets vanish, nothing is reset."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.clocked_environment import step_times
from tests.support.hosts import Host, cut, hosts, why_impossible
from tests.support.single_services import Service, SingleServices, single_services

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DELAY = 0.05  # max_batch_delay, long enough to show among what else takes time
NOISE = 0.5  # seconds that a busy machine may add to a step
NOTICED = 30.0  # keepalive: 10 s without a word, then 10 s without an answer to a ping; and room
CUT = 60.0
SILENCE = 4.0  # shorter than what is taken for death
GROUPS, ROWS = 2, 4  # of each actor

LAYOUTS = {
    "one server": ("server", "server", "server"),
    "each on its own": ("nats", "inference", "learner"),
}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[SingleServices]:
    if reason := why_impossible():
        pytest.skip(reason)
    with single_services(tmp_path) as started:
        yield started


def actor(services: SingleServices, host: Host) -> Service:
    clock = {"directory": str(services.directory)}
    return services.start(
        "actor",
        "tests.support.clocked_environment:Clocked-v0",
        f"--groups={GROUPS}",
        f"--group-size={ROWS}",
        f"--env-kwargs={json.dumps(clock)}",
        "--no-shared-memory",  # as between machines; these hosts have one memory
        host=host,
    )


def started(
    services: SingleServices, *, nats: Host, inference: Host, learner: Host
) -> tuple[Service, Service]:
    """NATS, inference and the learner; the latter two are returned."""
    services.nats(nats)
    same = ("--preset", "cartpole", "--max-queued-batches", "8")
    acting = services.start("inference", *same, f"--max-batch-delay={DELAY}", host=inference)
    training = services.start("learner", *same, "--resume", "--total-steps=100000000", host=learner)
    return acting, training


def gaps(times: list[NDArray[np.float64]], begin: float, end: float) -> NDArray[np.float64]:
    """Seconds from step to step of each environment between two moments, and to the latter."""
    parts = [each[(each >= begin) & (each <= end)] for each in times]
    return np.concatenate([np.diff(np.concatenate([[begin], part, [end]])) for part in parts])


def live_streams(inference: Service) -> int:
    return len(inference.status().get("streams", ()))


def ended_with_exact_accounts(
    services: SingleServices, *, actors: list[Service], inference: Service, learner: Service
) -> int:
    """Ends everything but NATS, the senders first; the steps that inference discarded."""
    assert [each.end() for each in actors] == [0] * len(actors)
    services.until(lambda: live_streams(inference) == 0, seconds=5, what="the streams to end")
    services.until(lambda: inference.status()["queued_publishes"] == 0, seconds=20, what="all published")
    last = inference.status()
    assert (inference.end(), learner.end()) == (0, 0)
    counts = services.assert_exact(acted=last["steps_total"], discarded=last["discarded_steps"])
    print(f"accounts: {counts}, steps {last['steps_total']}, discarded {last['discarded_steps']}")
    assert counts["trained"] > 0
    return int(last["discarded_steps"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_host_of_actors_that_vanishes_holds_nobody_up_and_comes_back_by_itself(
    services: SingleServices, layout: str
) -> None:
    names = list(dict.fromkeys(LAYOUTS[layout]))
    with hosts(*names, "a", "b") as made:
        by_name = dict(zip([*names, "a", "b"], made, strict=True))
        nats, acting, training = (by_name[name] for name in LAYOUTS[layout])
        inference, learner = started(services, nats=nats, inference=acting, learner=training)
        first, second = actor(services, by_name["a"]), actor(services, by_name["b"])
        services.until(lambda: live_streams(inference) == 2 * GROUPS, what="the actors")
        services.until_more_steps(4000)
        calm = time.monotonic()
        services.until_more_steps(2000)
        everybody_else = [host for host in made if host is not by_name["b"]]
        with cut([by_name["b"]], everybody_else):
            begin = time.monotonic()
            services.until(lambda: live_streams(inference) == GROUPS, seconds=NOTICED, what="be noticed")
            noticed = time.monotonic()
            discarded = inference.status()["discarded_steps"]
            assert discarded > 0
            services.until(lambda: time.monotonic() > begin + CUT, seconds=2 * CUT)
        end = time.monotonic()
        services.until(lambda: live_streams(inference) == 2 * GROUPS, seconds=10, what="host b")
        back = time.monotonic()
        services.until_more_steps(2000)
        over = time.monotonic()
        assert first.process.poll() is None
        assert second.process.poll() is None
        mine = step_times(services.directory, first.process.pid)
        before, blind, gone, after = (
            gaps(mine, *window) for window in ((calm, begin), (begin, noticed), (noticed, end), (end, over))
        )
        print(f"\nnoticed after {noticed - begin:.1f} s; back {back - end:.2f} s after the link")
        for name, each in (("calm", before), ("blind", blind), ("gone", gone), ("after", after)):
            print(f"{name}: median {np.median(each):.4f} s, longest {each.max():.3f} s of {len(each)}")
        for each in (blind, gone, after):
            assert each.max() < before.max() + DELAY + NOISE
        # Nobody knows yet that the others are dead: every batch waits for them, and no longer than it may.
        assert DELAY <= np.median(blind) < DELAY + np.median(before) + 0.05
        assert np.median(gone) < DELAY
        others = step_times(services.directory, second.process.pid)
        assert all(each.max() > back - 1 for each in others)
        ended_with_exact_accounts(services, actors=[first, second], inference=inference, learner=learner)


@pytest.mark.parametrize("who", ["inference", "learner"])
def test_a_service_cut_off_from_nats_goes_on_where_it_was(services: SingleServices, who: str) -> None:
    with hosts("nats", "inference", "learner", "a") as (nats, acting, training, far):
        inference, learner = started(services, nats=nats, inference=acting, learner=training)
        only = actor(services, far)
        services.until_more_steps(4000)
        cut_off, host = {"inference": (inference, acting), "learner": (learner, training)}[who]
        with cut([host], [each for each in (nats, acting, training) if each is not host]):
            begin = time.monotonic()
            services.until(
                lambda: "NATS" in str(cut_off.status().get("waiting")), seconds=NOTICED, what="be noticed"
            )
            noticed = time.monotonic()
            services.until(lambda: time.monotonic() > begin + CUT, seconds=2 * CUT)
            stalled = services.accounts().steps
            assert live_streams(inference) == GROUPS
        end = time.monotonic()
        services.until(lambda: services.accounts().steps > stalled, seconds=20, what="steps")
        print(
            f"\nnoticed after {noticed - begin:.1f} s; trained {time.monotonic() - end:.2f} s after the link"
        )
        services.until_more_steps(2000)
        assert all(each.process.poll() is None for each in (inference, learner, only))
        ended_with_exact_accounts(services, actors=[only], inference=inference, learner=learner)
        print(f"redelivered {services.accounts().redelivered}")


def test_a_silence_of_seconds_is_waited_out_on_the_same_streams(services: SingleServices) -> None:
    with hosts("server", "a") as (server, far):
        inference, learner = started(services, nats=server, inference=server, learner=server)
        only = actor(services, far)
        services.until_more_steps(2000)
        before = {stream["stream_id"] for stream in inference.status()["streams"]}
        with cut([far], [server]):
            begin = time.monotonic()
            services.until(lambda: time.monotonic() > begin + SILENCE, seconds=2 * SILENCE)
        end = time.monotonic()
        mine = services.until(
            lambda: [each for each in step_times(services.directory, only.process.pid) if each[-1] > end],
            seconds=2 * SILENCE,
            what="steps",
        )
        print(f"\nsteps again {min(each[each > end][0] for each in mine) - end:.2f} s after the link")
        services.until_more_steps(2000)
        assert {stream["stream_id"] for stream in inference.status()["streams"]} == before
        discarded = ended_with_exact_accounts(services, actors=[only], inference=inference, learner=learner)
        assert discarded < GROUPS * ROWS * 20
