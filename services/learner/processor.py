"""How busy the machine is on which the learner runs, as Linux tells it."""

from pathlib import Path


class Processor:
    """How busy this machine's processor is; where Linux does not say it, unknown."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._last = self._read()
        self.busy: float | None = None  # share of all cores' time between the last two samples

    def sample(self) -> None:
        """Takes the counters of now."""
        now = self._read()
        if now is not None and self._last is not None and now[1] > self._last[1]:
            idle, whole = now[0] - self._last[0], now[1] - self._last[1]
            self.busy = round(1.0 - idle / whole, 3)
        self._last = now

    def _read(self) -> tuple[int, int] | None:
        """Idle and all ticks."""
        try:
            ticks = [int(word) for word in self._stat.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        return ticks[3] + ticks[4], sum(ticks)
