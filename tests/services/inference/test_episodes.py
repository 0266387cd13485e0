import numpy as np

from services.inference.episodes import Episode, EpisodeCounter


def observe(
    counter: EpisodeCounter,
    reward: list[float],
    *,
    terminated: str | None = None,
    truncated: str | None = None,
    is_first: str | None = None,
    version: int = 1,
) -> list[Episode]:
    """Flags as words of 0 and 1, one digit per row."""
    bits = [
        np.array([digit == "1" for digit in word or "0" * len(reward)])
        for word in (terminated, truncated, is_first)
    ]
    return counter.observe(
        reward=np.array(reward, dtype=np.float32),
        terminated=bits[0],
        truncated=bits[1],
        is_first=bits[2],
        weights_version=version,
    )


def test_a_return_is_the_raw_sum_from_first_to_first() -> None:
    counter = EpisodeCounter(1)
    assert observe(counter, [99.0], is_first="1") == []  # a reset's reward belongs to nobody
    observe(counter, [10.0])
    observe(counter, [-3.5], terminated="1", version=7)
    finished = observe(counter, [0.0], is_first="1", version=8)
    assert finished == [Episode(row=0, episode_return=6.5, length=2, weights_version=7)]
    observe(counter, [1.0], truncated="1")
    finished = observe(counter, [0.0], is_first="1")
    assert [(episode.episode_return, episode.length) for episode in finished] == [(1.0, 1)]


def test_a_lost_life_ends_no_episode() -> None:
    counter = EpisodeCounter(1)
    observe(counter, [0.0], is_first="1")
    observe(counter, [1.0], terminated="1")
    assert observe(counter, [2.0]) == []
    observe(counter, [4.0], terminated="1")
    finished = observe(counter, [0.0], is_first="1")
    assert [(episode.episode_return, episode.length) for episode in finished] == [(7.0, 3)]


def test_an_episode_cut_off_without_an_end_does_not_count() -> None:
    counter = EpisodeCounter(2)
    observe(counter, [0.0, 0.0], is_first="11")
    observe(counter, [5.0, 5.0], terminated="10")
    finished = observe(counter, [0.0, 0.0], is_first="11")
    assert [episode.row for episode in finished] == [0]
    observe(counter, [1.0, 1.0], terminated="11")
    assert [episode.episode_return for episode in observe(counter, [0.0, 0.0], is_first="11")] == [1.0, 1.0]


def test_a_reset_after_a_reset_is_no_episode() -> None:
    counter = EpisodeCounter(1)
    observe(counter, [0.0], is_first="1")
    assert observe(counter, [0.0], is_first="1") == []


def test_rows_end_their_episodes_independently() -> None:
    counter = EpisodeCounter(3)
    observe(counter, [0.0, 0.0, 0.0], is_first="111")
    observe(counter, [1.0, 2.0, 3.0], truncated="010")
    finished = observe(counter, [1.0, 0.0, 3.0], is_first="010")
    assert [(episode.row, episode.episode_return) for episode in finished] == [(1, 2.0)]
    observe(counter, [1.0, 2.0, 3.0], terminated="101")
    finished = observe(counter, [0.0, 2.0, 0.0], is_first="101")
    assert [(episode.row, episode.episode_return, episode.length) for episode in finished] == [
        (0, 3.0, 3),
        (2, 9.0, 3),
    ]
