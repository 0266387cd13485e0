"""PEM files that settings name, and what is wrong with them in words; knows no protocol."""

import ssl
from pathlib import Path

from shared.errors import ConfigurationError


def trusting(setting: str, path: Path) -> ssl.SSLContext:
    """A client's context that believes those for whom the certificates in `path` vouch.

    Raises ConfigurationError, which names the `setting`, where there are none.
    """
    try:
        return ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{setting}: {path} holds no PEM certificates") from error
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from error


def check_readable(setting: str, path: Path) -> None:
    """Raises ConfigurationError, which names the `setting`; a context does not say which file it missed."""
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from error
