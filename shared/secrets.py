"""Secrets from files, and what must not be said on a command line or in a preset."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from shared.errors import ConfigurationError
from shared.presets import Preset

# In one or several URLs, also without a scheme, and where what should be percent-encoded is not.
_CREDENTIALS = re.compile(r"(^\s*|,\s*)(\w+://)?[^,]*@")


def with_secret_from_file(values: dict[str, Any], name: str) -> dict[str, Any]:
    """`values` with the setting `name` in place of the file `<name>_file`. Raises ValueError.

    An empty secret is refused: it would open to all what somebody meant to close.
    """
    given = values.get(name)
    text = given.get_secret_value() if isinstance(given, SecretStr) else str(given or "")
    if given is not None and not text.strip():
        raise ValueError(f"{name} is empty; leave it unset where none is wanted")
    path = values.get(f"{name}_file")
    if not isinstance(path, str | Path):  # none, or none that the model takes
        return values
    if given is not None:
        raise ValueError(f"{name} and {name}_file: give one of them")
    try:
        text = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise ValueError(f"{name}_file: cannot read {path}: {reason}") from error
    if not text:
        raise ValueError(f"{name}_file: {path} is empty")
    rest = {key: value for key, value in values.items() if key != f"{name}_file"}
    return {**rest, name: text}


def without_credentials(url: str) -> str:
    """`url` without user, password or token."""
    return _CREDENTIALS.sub(r"\1\2", url)


def check_command_line(values: Mapping[str, Any], secrets: frozenset[str], prefix: str) -> None:
    """Raises ConfigurationError for a secret on the command line, where process lists show it."""
    for name in values.keys() & secrets:
        option = f"--{name.replace('_', '-')}"
        raise ConfigurationError(
            f"{option}: process lists would show it; give {prefix}{name.upper()} in the environment, "
            f"or {option}-file"
        )
    if _CREDENTIALS.search(str(values.get("nats_url", ""))):
        raise ConfigurationError(
            f"--nats-url: process lists would show its credentials; give {prefix}NATS_URL in the environment"
        )


def check_preset(preset: Preset, secrets: frozenset[str], prefix: str) -> None:
    """Raises ConfigurationError for a secret in a preset: such files are passed on and kept with runs."""
    for name in sorted(preset.values.keys() & secrets):
        raise ConfigurationError(
            f"preset {preset.sources[name]}: {name}: presets hold no secrets; "
            f"give {prefix}{name.upper()} in the environment, or {name}_file"
        )
    if _CREDENTIALS.search(str(preset.values.get("nats_url", ""))):
        raise ConfigurationError(
            f"preset {preset.sources['nats_url']}: nats_url: presets hold no credentials; give "
            f"{prefix}NATS_URL in the environment"
        )
