"""A log that does not grow with what goes wrong; knows no particular event."""

import time
from collections.abc import Callable
from typing import Any, Protocol


class _Logger(Protocol):
    def error(self, event: str, **values: Any) -> Any: ...


class SparingLog:
    """Logs the first of many alike events, then one now and then, which says how many were left out."""

    def __init__(
        self,
        log: _Logger,
        *,
        first: int = 10,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """After `first` events there is at most one per `seconds`."""
        self._log = log
        self._left = first
        self._seconds = seconds
        self._clock = clock
        self._logged_at = 0.0
        self._unlogged = 0

    def error(self, event: str, **values: Any) -> None:
        """Logs an event, or counts it."""
        now = self._clock()
        if not self._left and now - self._logged_at < self._seconds:
            self._unlogged += 1
            return
        if self._unlogged:
            values["unlogged"] = self._unlogged
        self._left, self._logged_at, self._unlogged = max(0, self._left - 1), now, 0
        self._log.error(event, **values)
