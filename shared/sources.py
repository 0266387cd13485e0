"""What the command line and the environment say, not yet validated; knows no service's settings."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    SettingsError,
)

from shared.descriptions import arranged, default, description
from shared.errors import ConfigurationError
from shared.presets import ENV_PREFIX, nearest

(_POSITIONAL,) = get_args(CliPositionalArg[str])[1:]


class _Variables(EnvSettingsSource):
    """Of the environment: lists with commas, as on the command line, mappings as JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Raises ConfigurationError."""
        if get_origin(field.annotation) is tuple:
            return [each for each in value.strip().removeprefix("[").removesuffix("]").split(",") if each]
        try:
            return json.loads(value)
        except ValueError as error:
            variable = ENV_PREFIX + field_name.upper()
            raise ConfigurationError(f"{variable} must be JSON (got {value})") from error


def _arrange_help(parser: Any, model: type[BaseModel], prog: str) -> None:
    """Puts options below their headings, those of the command itself first, and a short usage above all."""
    positional = [action for action in parser._actions if not action.option_strings]
    words = [f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar) for action in positional]
    parser.usage = " ".join([prog, "[OPTIONS]", *words])
    for action in positional:  # environment or preset may say it
        action.nargs, action.required = "?", False
    actions = {action.dest: action for action in parser._actions}
    own = parser._optionals
    for heading, names in arranged(model).items():
        group = own if heading is None else parser.add_argument_group(heading.value)
        for name in names:
            action = actions[_destination(name, model.model_fields[name])]
            _describe(action, model, name)
            if action in own._group_actions:
                own._group_actions.remove(action)
                group._group_actions.append(action)


def _describe(action: argparse.Action, model: type[BaseModel], name: str) -> None:
    field = model.model_fields[name]
    value = default(field)
    if action.help is not argparse.SUPPRESS:
        text = description(model, name) + (f" (default: {value})" if value is not None else "")
        action.help = text.replace("%", "%%")
    if get_origin(field.annotation) is tuple:
        (kind,) = re.findall(r"tuple\[(\w+)", str(action.metavar))
        action.metavar = f"{kind},{kind},..."
    elif get_origin(field.annotation) is dict:
        action.metavar, action.type = "JSON", _json_object


def _json_object(text: str) -> str:
    """`text`, where it is one: pydantic-settings would also take k=v, and every v for a string."""
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise argparse.ArgumentTypeError("no JSON object such as '{\"size\": 5}'")
    return text.replace(
        r"\\", r"\u005c"
    )  # where a string ends with one, pydantic-settings looks on for its end


def _destination(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else name


def settings_names(*models: type[BaseModel]) -> set[str]:
    """Names that a preset and the environment may use."""
    return {
        name for each in models for name, field in each.model_fields.items() if not field.validation_alias
    }


def command_line(model: type[BaseSettings], arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """The settings among `arguments`. Raises ConfigurationError; `--help` prints and raises SystemExit(0)."""
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(model, cli_prog_name=prog)
        _arrange_help(source.root_parser, model, prog)
        source(args=list(arguments))
        return dict(source())
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ").removeprefix("argument ")
        raise ConfigurationError(f"{text} (see {prog} --help)") from error


def environment(model: type[BaseSettings], names: set[str]) -> dict[str, Any]:
    """The model's settings in the environment, where all that begins with our prefix must be among `names`.

    Raises ConfigurationError.
    """
    for variable in os.environ:
        if variable.upper().startswith(ENV_PREFIX) and variable[len(ENV_PREFIX) :].lower() not in names:
            raise ConfigurationError(f"{variable} is no setting{nearest(variable, names)}")
    given = _Variables(model)()
    return {name: value for name, value in given.items() if name in names}  # not JSON, which is --json's


def flag(model: type[BaseModel], name: str) -> str:
    """What a setting is called on the command line."""
    field = model.model_fields.get(name)
    if field is not None and _POSITIONAL in field.metadata:
        return name.upper().replace("_", "-")
    return f"--{(name if field is None else _destination(name, field)).replace('_', '-')}"
