"""Whether something takes less time than handing it to another thread would."""

_QUICK_SECONDS = 0.0005
_ENOUGH = 32
_SLOW = 2  # quick ones that one slow one outweighs: a thread may have to wait for the interpreter


class Quickness:
    """Yes after enough quick ones, until slow ones have outweighed them."""

    def __init__(self) -> None:
        self._votes = 0
        self.is_quick = False

    def took(self, seconds: float) -> None:
        """It was done once more."""
        if seconds < _QUICK_SECONDS:
            self._votes = min(self._votes + 1, _ENOUGH)
        else:
            self._votes = max(self._votes - _SLOW, 0)
        if self._votes in (0, _ENOUGH):
            self.is_quick = self._votes == _ENOUGH
