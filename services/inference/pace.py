"""How often to look for something that nobody tells of."""

_LOOKS = 4  # in the time that it took before


class Pace:
    """Time between two looks: a fraction of how long was waited the last time, within limits.

    So what takes long costs few looks, what is there soon is seen soon, and either is seen late by an eighth
    of the wait on average.
    """

    def __init__(self, *, first: float, least: float, most: float) -> None:
        """Seconds between looks: before anything is known, and at least and at most afterwards."""
        self.seconds = first
        self._least = least
        self._most = most

    def waited(self, seconds: float) -> None:
        """What was looked for was seen after `seconds`."""
        self.seconds = min(max(seconds / _LOOKS, self._least), self._most)
