"""Presets: settings by name in YAML files, which may build on one another; knows no configuration model."""

import difflib
import os
import sysconfig
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from shared.errors import ConfigurationError

ENV_PREFIX = "SEEDRL_"
_BASE = "preset"  # the key that names the preset a file builds on


class Preset(NamedTuple):
    """Settings by name, and for each the preset that sets it: the one that was asked for, or one below."""

    values: dict[str, Any]
    sources: dict[str, str]


def preset_path(name: str) -> Path:
    """The file of a preset: a path as it is, a name from the presets that come with the project."""
    return Path(name) if _is_path(name) else _directory() / f"{name}.yaml"


def preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def presets_with(key: str, value: object) -> list[str]:
    """Names of the presets that come with the project and set `key` to `value`."""
    return [name for name in preset_names() if read_preset(name).values.get(key) == value]


def read_preset(name: str, names: Collection[str] | None = None) -> Preset:
    """The settings of preset `name`, over those of the preset that its key `preset` names, if any.

    A path there is relative to the file that it is in. Raises ConfigurationError when a file is missing, is
    not YAML, sets something twice, holds something that is not among `names`, or builds on itself.
    """
    settings, sources = dict[str, Any](), dict[str, str]()
    seen: list[str] = []
    base: str | None = name
    while base is not None:
        if os.path.normpath(base) in map(os.path.normpath, seen):
            raise ConfigurationError(f"preset {base} builds on itself: {' → '.join([*seen, base])}")
        values = _read(base, names, above=seen)
        seen.append(base)
        below = values.pop(_BASE, None)
        settings = values | settings
        sources = dict.fromkeys(values, base) | sources
        base = None if below is None else _beside(base, below)
    return Preset(settings, sources)


def nearest(name: str, names: Collection[str]) -> str:
    """A question with the one of `names` that is most like `name`; empty when none is."""
    bare = name.removeprefix(ENV_PREFIX).lower()
    close = difflib.get_close_matches(bare, list(names), n=1)
    if not close:
        return ""
    return f"; did you mean {ENV_PREFIX + close[0].upper() if name.startswith(ENV_PREFIX) else close[0]}?"


class _SetTwice(Exception):
    """A key that a mapping has twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in known:
                    raise _SetTwice(f"{key.value!r} is set twice, again in line {key.start_mark.line + 1}")
                known.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


def _read(name: str, names: Collection[str] | None, *, above: list[str]) -> dict[str, Any]:
    try:
        values = yaml.load(preset_path(name).read_text(), _Loader) or {}
    except FileNotFoundError as error:
        asking = f" (preset {above[-1]} builds on it)" if above else ""
        if _is_path(name):
            raise ConfigurationError(f"preset {name}: there is no such file{asking}") from error
        raise ConfigurationError(
            f"unknown preset {name!r}; there are {', '.join(preset_names())}; or give a .yaml file{asking}"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"preset {name}: {error.strerror}") from error
    except _SetTwice as error:
        raise ConfigurationError(f"preset {name}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no date
        raise ConfigurationError(f"preset {name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"preset {name}: holds {type(values).__name__}, not settings by name")
    for key in values:
        if names is not None and key not in names:
            raise ConfigurationError(f"preset {name}: {key!r} is no setting{nearest(str(key), names)}")
    return dict(values)


def _beside(name: str, below: object) -> str:
    """The preset `below` that the one called `name` builds on; a path is relative to that of `name`."""
    if not isinstance(below, str):
        raise ConfigurationError(f"preset {name}: {_BASE} must be a name or a .yaml file, not {below!r}")
    return str(preset_path(name).parent / below) if _is_path(below) else below


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or os.sep in name


def _directory() -> Path:
    beside = Path(__file__).resolve().parent.parent / "presets"
    return beside if beside.is_dir() else Path(sysconfig.get_path("data")) / "share/seedrl/presets"
