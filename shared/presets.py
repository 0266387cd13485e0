"""Presets: settings by name in YAML files, which may build on one another; knows no configuration model."""

import difflib
import os
import sysconfig
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.errors import ConfigurationError

ENV_PREFIX = "SEEDRL_"
_BASE = "preset"  # the key that names the preset a file builds on


def preset_path(name: str) -> Path:
    """The file of a preset: a path as it is, a name from the presets that come with the project."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        return Path(name)
    return _directory() / f"{name}.yaml"


def preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def read_preset(name: str, names: Collection[str]) -> dict[str, Any]:
    """The settings of preset `name`, over those of the preset that its key `preset` names, if any.

    Raises ConfigurationError when a file is missing, is not YAML, holds something that is not among `names`,
    or builds on itself.
    """
    settings: dict[str, Any] = {}
    seen: list[str] = []
    base: Any = name
    while base is not None:
        if base in seen:
            raise ConfigurationError(f"preset {base} builds on itself: {' → '.join([*seen, base])}")
        seen.append(str(base))
        values = _read(str(base), names)
        base = values.pop(_BASE, None)
        settings = values | settings
    return settings


def nearest(name: str, names: Collection[str]) -> str:
    """A question with the one of `names` that is most like `name`; empty when none is."""
    bare = name.removeprefix(ENV_PREFIX).lower()
    close = difflib.get_close_matches(bare, list(names), n=1)
    if not close:
        return ""
    return f"; did you mean {ENV_PREFIX + close[0].upper() if name.startswith(ENV_PREFIX) else close[0]}?"


def _read(name: str, names: Collection[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(preset_path(name).read_text()) or {}
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"unknown preset {name!r}; there are {', '.join(preset_names())}; or give a .yaml file"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"preset {name}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"preset {name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"preset {name}: holds {type(values).__name__}, not settings by name")
    for key in values:
        if key not in names:
            raise ConfigurationError(f"preset {name}: {key!r} is no setting{nearest(str(key), names)}")
    return dict(values)


def _directory() -> Path:
    beside = Path(__file__).resolve().parent.parent / "presets"
    return beside if beside.is_dir() else Path(sysconfig.get_path("data")) / "share/seedrl/presets"
