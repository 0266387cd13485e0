"""Standard output of a command that goes on without it; knows no command."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output:
    """Standard output, which goes on in silence when it cannot be written any more.

    Nobody may read it, its terminal be closed, its disk full: the run matters more than what is said of it.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process

    def write(self, text: str) -> int:
        """Length of `text`."""
        with self._silence_instead():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        with self._silence_instead():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _silence_instead(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)
