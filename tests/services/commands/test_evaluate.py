"""Which episodes an evaluation counts."""

from services.commands.evaluate import EpisodeShares


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
