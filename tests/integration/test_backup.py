"""Run directory and NATS store are copied, lost and put back: the run goes on with exact accounts."""

import shutil

import pytest

from shared.checkpoints import latest_checkpoint
from tests.support.single_services import Service, SingleServices

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

PRESETS = {"vtrace": "cartpole", "r2d2": "cartpole_r2d2"}
ON = 3000  # steps after which training is taken to go on


def run_of(services: SingleServices, agent: str) -> list[Service]:
    """All services of the run, those first that end first."""
    same = ("--preset", PRESETS[agent])
    nats = services.nats()
    learner = services.start(
        "learner", *same, "--resume", "--total-steps=100000000", "--checkpoint-seconds=1"
    )
    inference = services.start("inference", *same)
    replay = [services.start("replay", *same)] if agent == "r2d2" else []
    return [services.start("actor", "CartPole-v1", *same), inference, learner, *replay, nats]


def ended(running: list[Service]) -> None:
    assert [each.end() for each in running[:-1]] == [0] * len(running[:-1])
    running[-1].end()


def saved_steps(services: SingleServices) -> int:
    checkpoint = latest_checkpoint(services.run_dir / "checkpoints")
    assert checkpoint is not None
    return int(checkpoint.counters["steps"])


def restored(services: SingleServices, *names: str) -> None:
    """Loses everything and puts back the copies of `names`."""
    for name in ("runs", "nats"):
        shutil.rmtree(services.directory / name)
    for name in names:
        shutil.copytree(services.directory / "backup" / name, services.directory / name)


def goes_on_exactly_from(services: SingleServices, steps: int, agent: str) -> None:
    running = run_of(services, agent)
    services.until_more_steps(ON)
    learner = running[2]
    assert services.accounts().steps < steps + 20 * ON  # the later ones are forgotten
    assert learner.status()["mean_return_100"] is not None
    assert [each.end() for each in running[:-1]] == [0] * len(running[:-1])
    services.assert_exact()
    running[-1].end()


@pytest.mark.parametrize("agent", PRESETS)
def test_a_backup_of_a_stopped_run_is_restored_whole(services: SingleServices, agent: str) -> None:
    running = run_of(services, agent)
    services.until_more_steps(ON)
    ended(running)
    at_backup = services.accounts()
    for name in ("runs", "nats"):
        shutil.copytree(services.directory / name, services.directory / "backup" / name)

    running = run_of(services, agent)
    services.until_more_steps(ON)
    ended(running)
    assert services.accounts().steps > at_backup.steps

    restored(services, "runs", "nats")
    assert services.accounts() == at_backup
    assert saved_steps(services) == at_backup.steps
    goes_on_exactly_from(services, at_backup.steps, agent)
    assert services.accounts().rolled_back == services.accounts_of_messages().rolled_back == 0


@pytest.mark.parametrize("agent", PRESETS)
def test_a_run_directory_copied_under_training_is_restored_with_an_empty_nats(
    services: SingleServices, agent: str
) -> None:
    running = run_of(services, agent)
    services.until_more_steps(ON)
    shutil.copytree(services.run_dir, services.directory / "backup" / "runs" / services.run_dir.name)
    services.until_more_steps(ON)
    ended(running)

    restored(services, "runs")
    at_backup = services.accounts()
    goes_on_exactly_from(services, at_backup.steps, agent)
    assert services.accounts().steps >= at_backup.steps + ON
    assert services.accounts().updates > at_backup.updates
