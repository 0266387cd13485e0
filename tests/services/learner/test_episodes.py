"""Finished episodes."""

from typing import Any

from services.learner.accounts import Accounts
from services.learner.episodes import Episode, EpisodeLog


def published(**changes: Any) -> dict[str, Any]:
    return {"role": "train", "return": 1.0, "length": 5, **changes}


def test_training_episodes_are_counted_and_handed_on_once() -> None:
    accounts = Accounts()
    log = EpisodeLog(accounts)
    log.note([published(**{"return": 3}), published(role="eval", **{"return": 100.0})])
    log.note([published(length=9)])
    assert (accounts.episodes, list(accounts.returns)) == (2, [3.0, 1.0])
    assert log.take() == [Episode(3.0, 5), Episode(1.0, 9)]
    assert log.take() == []


def test_an_unreadable_episode_disturbs_no_other() -> None:
    accounts = Accounts()
    log = EpisodeLog(accounts)
    log.note([{}, published(**{"return": "much"}), published(), published(length=None)])
    assert accounts.episodes == 1
