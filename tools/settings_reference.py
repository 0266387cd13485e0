"""Writes docs/settings.md, the reference of all settings, from the configuration models and the presets."""

import argparse
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from services.cli import COMMANDS, SERVICES
from shared.config import SECRETS, Settings
from shared.descriptions import arranged, as_text, default, description
from shared.kinds import Heading
from shared.presets import ENV_PREFIX, preset_names, read_preset
from shared.sources import flag

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/settings.md"
INTRODUCTION = """\
# Settings

Made by `python -m tools.settings_reference` from what `--help` shows; a test holds the two together.

A setting is an option on the command line, a variable in the environment, and in a preset (YAML, see
[presets/](../presets)) what the variable is called after `SEEDRL_`, in lower case. Options win over the
environment, that over the preset, that over the default. Environment and preset may hold settings of any
command, and of both agents. `--name` switches on what is true or false, `--no-name` off; lists have commas.

What begins with [vtrace] or [r2d2] is for that agent alone. A setting with several rows means something else
to some commands. Presets that are not named leave the default.
"""
KINDS = {"boolean": "true, false", "integer": "int", "number": "float", "object": "JSON", "string": "str"}
HEAD = "| setting | values | default | in presets | of | what it is |\n|---|---|---|---|---|---|"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class Row(NamedTuple):
    """What a setting is for some commands."""

    names: str
    values: str
    default: str
    presets: str
    words: str


def document() -> str:
    """The text of docs/settings.md."""
    below: dict[Heading | None, dict[Row, list[str]]] = {each: {} for each in (*Heading, None)}
    for command in ("train", *SERVICES, *COMMANDS):
        for heading, row in _rows(_model(command)):
            commands = below[heading].setdefault(row, [])
            commands += [command] if command not in commands else []
    return INTRODUCTION + "".join(_section(heading, rows) for heading, rows in below.items())


def _section(heading: Heading | None, rows: dict[Row, list[str]]) -> str:
    lines = [f"\n## {heading.value if heading else 'Single commands'}\n", HEAD]
    first = list(dict.fromkeys(row.names for row in rows))
    for row in sorted(rows, key=lambda row: first.index(row.names)):
        cells = (row.names, row.values, row.default, row.presets, ", ".join(rows[row]), row.words)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(model: type[Settings]) -> Iterator[tuple[Heading | None, Row]]:
    schemas = model.model_json_schema(by_alias=False)["properties"]
    for heading, names in arranged(model).items():
        for name in names:
            field = model.model_fields[name]
            if argparse.SUPPRESS in field.metadata and name not in SECRETS:
                continue
            option = [] if name in SECRETS else [flag(model, name)]
            variable = [] if field.validation_alias else [ENV_PREFIX + name.upper()]
            usual = default(field)
            row = Row(
                names="<br>".join(f"`{each}`" for each in option + variable),
                values=_values(schemas[name]),
                default=f"`{usual}`" if usual else "",
                presets=_in_presets(name, usual),
                words=description(model, name).replace("|", "\\|"),
            )
            yield heading, row


def _values(schema: dict[str, Any]) -> str:
    schema = next((each for each in schema.get("anyOf", ()) if each["type"] != "null"), schema)
    if schema["type"] == "array":
        return f"{_values(schema['items'])}; several"
    if choices := schema.get("enum"):
        return ", ".join(choices)
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in BOUNDS.items() if key in schema]
    return ", ".join([schema.get("format", KINDS[schema["type"]]), *bounds])


def _number(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power > 16 and bound == 2**power else f"{bound:g}"


def _in_presets(name: str, usual: str | None) -> str:
    values: dict[str, list[str]] = {}
    for preset, settings in _presets().items():
        if name in settings and (value := as_text(settings[name])) != usual:
            values.setdefault(value, []).append(preset)
    return "<br>".join(f"`{value}`: {', '.join(presets)}" for value, presets in values.items())


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: read_preset(name).values for name in preset_names()}


def _model(command: str) -> type[Settings]:
    module, _, name = COMMANDS[command].config.partition(":")
    model: type[Settings] = getattr(importlib.import_module(module), name)
    return model


if __name__ == "__main__":
    DOCUMENT.write_text(document())
