"""Files that are never seen half written."""

import os
from pathlib import Path

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Of the errors of a disk, those that say that something is not there; any other may pass."""


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Puts `content` in the place of `path` in one step; `path` stays as it is when that fails.

    It then survives the end of this process; `durable` makes it survive the machine's, at the cost of
    waiting for the disk. Raises OSError.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:  # buffered: it writes on where a disk takes only a part
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Returns once what was created and renamed in `path` is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
