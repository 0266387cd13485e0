"""What a child process is told before it runs, so that it ends with its parent, however that ends."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def ending_with_this_process() -> Callable[[], None]:
    """A `preexec_fn` for a child, which then gets SIGTERM when this process dies (on Linux)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # not loaded between fork and exec
    parent = os.getpid()

    def end_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the call
                os._exit(1)

    return end_with_parent
