"""What the command line and the environment say, not yet validated; knows no service's settings."""

import json
import os
from collections.abc import Sequence
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsError

from shared.errors import ConfigurationError
from shared.presets import ENV_PREFIX, nearest


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


def _order_help(parser: Any, model: type[BaseModel], prog: str) -> None:
    """Puts a command's own options before those it shares with others, and a short usage above them."""
    own = [f"--{name.replace('_', '-')}" for name in model.__annotations__]
    positional = [action for action in parser._actions if not action.option_strings]
    words = [f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar) for action in positional]
    parser.usage = " ".join([prog, "[OPTIONS]", *words])
    for group in parser._action_groups:
        group._group_actions.sort(key=lambda action: not set(own) & set(action.option_strings))


def settings_names(*models: type[BaseModel]) -> set[str]:
    """Names that a preset and the environment may use."""
    return {
        name for each in models for name, field in each.model_fields.items() if not field.validation_alias
    }


def command_line(model: type[BaseSettings], arguments: Sequence[str], *, prog: str) -> dict[str, Any]:
    """The settings among `arguments`. Raises ConfigurationError; `--help` prints and raises SystemExit(0)."""
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(model, cli_prog_name=prog)
        _order_help(source.root_parser, model, prog)
        source(args=list(arguments))
        return dict(source())
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ")
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
    return f"--{name.replace('_', '-')}" if field is None or not field.is_required() else name.upper()
