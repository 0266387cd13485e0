"""Finished episodes: counted in the accounts, and kept until the next point of the curves."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from services.learner.accounts import Accounts
from shared.telemetry import get_logger

log = get_logger(__name__)


class Episode(NamedTuple):
    """Return (raw sum of rewards) and length (environment steps) of a finished training episode."""

    episode_return: float
    length: int


class EpisodeLog:
    """Takes episodes as inference publishes them; those of evaluation are left out."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._new: list[Episode] = []

    def note(self, published: Iterable[Mapping[str, Any]]) -> None:
        """Counts the training episodes among those `published`, oldest first."""
        episodes = []
        for fields in published:
            try:
                if fields["role"] == "train":
                    episodes.append(Episode(float(fields["return"]), int(fields["length"])))
            except (KeyError, TypeError, ValueError) as error:
                log.error("unreadable episode", reason=repr(error))
        self._accounts.count_episodes([episode.episode_return for episode in episodes])
        self._new += episodes

    def take(self) -> list[Episode]:
        """The training episodes since the last call."""
        episodes, self._new = self._new, []
        return episodes
