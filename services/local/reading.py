"""Reading a file of the run directory, which a crash, a full disk or a person may have damaged."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from shared.errors import RunError


def is_file(path: Path) -> bool:
    """Whether it is there. Raises RunError where that cannot be told."""
    try:
        return path.is_file()
    except OSError as error:  # of another user, before Python 3.14
        raise RunError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within, whatever shows that `path` does not hold what it should becomes a RunError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{path} is damaged: {words}") from error
