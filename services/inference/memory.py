"""How the C library treats memory that is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 2**31 - 1
_PAD_BYTES = 2**26


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks that are freed instead of giving them back to the kernel.

    Activations and frames are freed with every batch and wanted again with the next; to get them as fresh
    zeroed pages each time made inference with the deep ResNet on a CPU half as slow again. Best effort:
    without glibc, nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        mallopt(_M_TOP_PAD, _PAD_BYTES)
