"""For how long streams are held back, as one figure; knows no stream."""

from collections.abc import Callable
from time import monotonic


class HeldShare:
    """For how long, on average over several, each was held back."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._members = self._held = 0
        self._seconds, self._since = 0.0, clock()

    def change(self, *, members: int = 0, held: int = 0) -> None:
        """There are so many more of them from now on, or so many more held back."""
        self._seconds, self._since = self.seconds(), self._clock()
        self._members += members
        self._held += held

    def seconds(self) -> float:
        """The average's seconds so far."""
        if not self._held:
            return self._seconds
        share = min(1.0, self._held / max(1, self._members))
        return self._seconds + share * (self._clock() - self._since)
