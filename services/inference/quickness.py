"""Whether a policy is too quick to be worth a thread of its own."""

_QUICK_SECONDS = 0.0006  # of CPU time; to change threads and back takes a quarter of it, for every batch
_LONG_SECONDS = 0.002  # from begin to end, whoever used the CPU meanwhile
_ENOUGH = 32


class Quickness:
    """Yes after enough quick batches, until slow ones outweigh them: the longer, the sooner."""

    def __init__(self) -> None:
        self._votes = 0
        self.is_quick = False

    def took(self, *, seconds: float, cpu_seconds: float) -> None:
        """Another batch was computed; the latter are those of the thread that computed it."""
        if cpu_seconds < _QUICK_SECONDS and seconds < _LONG_SECONDS:
            self._votes = min(self._votes + 1, _ENOUGH)
        else:
            self._votes = max(self._votes - 1 - int(seconds / _LONG_SECONDS), 0)
        if self._votes in (0, _ENOUGH):
            self.is_quick = self._votes == _ENOUGH
