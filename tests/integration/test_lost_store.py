"""NATS loses its store while some services of a run are away: the run goes on by itself."""

import shutil
import signal

import pytest

from tests.support.single_services import Service, SingleServices

pytestmark = [pytest.mark.timeout(180)]

PRESETS = {"vtrace": "cartpole", "r2d2": "cartpole_r2d2"}
ON = 1000  # steps after which training is taken to go on


def started(services: SingleServices, name: str, agent: str) -> Service:
    words = {"actor": ["CartPole-v1"], "learner": ["--resume", "--total-steps=100000000"]}
    return services.start(name, *words.get(name, []), "--preset", PRESETS[agent])


@pytest.mark.parametrize(
    ("agent", "away"),
    [
        ("vtrace", "learner"),
        *(
            pytest.param(agent, away, marks=pytest.mark.slow)
            for agent, away in (
                ("vtrace", ""),
                ("vtrace", "inference"),
                ("vtrace", "learner inference"),
                ("vtrace", "learner inference actor"),
                ("r2d2", ""),
                ("r2d2", "learner"),
                ("r2d2", "inference"),
                ("r2d2", "replay"),
                ("r2d2", "learner inference"),
                ("r2d2", "learner replay"),
                ("r2d2", "inference replay"),
                ("r2d2", "learner inference replay"),
            )
        ),
    ],
)
def test_a_run_goes_on_when_nats_lost_its_store_while_some_services_were_away(
    services: SingleServices, agent: str, away: str
) -> None:
    names = ["learner", "inference", "actor", *(["replay"] if agent == "r2d2" else [])]
    nats = services.nats()
    running = {name: started(services, name, agent) for name in names}
    services.until_more_steps(ON)
    for name in away.split():
        running[name].end(signal.SIGKILL)
    nats.end(signal.SIGKILL)
    shutil.rmtree(services.directory / "nats")
    services.nats()
    for name in away.split():
        running[name] = started(services, name, agent)
    updates = services.accounts().updates
    services.until_more_steps(ON)
    services.until(lambda: services.accounts().updates > updates, what="an update")
