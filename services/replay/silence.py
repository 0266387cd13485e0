"""Which streams of chunks have ended, by how long nothing was heard of them; the clock is passed in."""

_LONG_SECONDS = 30.0


class Silence:
    """Which streams have ended: more silence than the slowest one has from chunk to chunk, while others were
    heard.
    """

    def __init__(self, now: float, *, least: float = 600.0, remembered: float = 86_400.0) -> None:
        """Seconds: it is at least that long; streams are remembered for so long after their last chunk."""
        self.seconds = least
        self._remembered = remembered
        self._heard: dict[str, float] = {}  # the one silent longest first
        self._heard_at = now  # at last
        self._since = now  # since then no stream was kept from being heard

    def heard(self, stream_id: str, now: float) -> None:
        """A chunk of that stream came."""
        if now - self._heard_at > _LONG_SECONDS:  # nobody's did: the run was paused, or NATS away
            self._since = now
        self._heard_at = now
        if (before := self._heard.pop(stream_id, None)) is not None:
            self.seconds = max(self.seconds, 4 * (now - before))
        self._heard[stream_id] = now
        while now - next(iter(self._heard.values())) > self._remembered:
            del self._heard[next(iter(self._heard))]

    def ended_before(self, now: float) -> float | None:
        """Streams not heard of since then have ended; None: that cannot be told yet."""
        return now - self.seconds if now - self._since > self.seconds else None

    def deaf(self, now: float) -> None:
        """Until now none could be heard, since the last chunk had to wait."""
        if now - self._heard_at > _LONG_SECONDS:
            self._since = now
        self._heard_at = now
