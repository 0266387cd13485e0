"""Which episodes an evaluation counts, and when it gives up."""

import asyncio
import sys
from pathlib import Path

import pytest

from services.commands.config import EvalConfig
from services.commands.evaluate import EpisodeShares, _episodes
from services.local.process import ChildProcess
from services.local.supervisor import SupervisedService
from shared.errors import RunError
from tests.support.nats import NatsRun


def episode(row: int, value: float) -> dict[str, float]:
    return {"row": row, "return": value}


def test_an_environment_with_short_episodes_does_not_play_the_share_of_the_others() -> None:
    shares = EpisodeShares(episodes=4, environments=2)
    shares.take([episode(0, 1.0), episode(0, 2.0), episode(0, 3.0), episode(1, 4.0)])
    assert [each["return"] for each in shares.episodes] == [1.0, 2.0, 4.0]
    assert not shares.complete
    shares.take([episode(1, 5.0)])
    assert shares.complete


def test_shares_add_up_when_they_do_not_divide() -> None:
    shares = EpisodeShares(episodes=5, environments=3)
    shares.take(episode(row, 0.0) for row in (0, 1, 2) for _ in range(9))
    assert len(shares.episodes) == 5
    assert shares.complete


@pytest.mark.parametrize(
    ("player", "seconds", "said"),
    [
        ("pass", 60.0, "a player ended before all episodes were played"),
        ("import time; time.sleep(60)", 0.2, "only 0 of 3 episodes ended"),
    ],
)
async def test_an_evaluation_that_cannot_be_completed_ends(
    player: str, seconds: float, said: str, nats: NatsRun, tmp_path: Path
) -> None:
    process = ChildProcess("p", lambda: [sys.executable, "-c", player], environment={}, log=tmp_path / "log")
    config = EvalConfig(run_dir=tmp_path, episodes=3, timeout=seconds)
    async with nats.bus() as bus:
        with pytest.raises(RunError, match=said):
            await asyncio.wait_for(_episodes(config, bus, [SupervisedService(process)]), 20)
