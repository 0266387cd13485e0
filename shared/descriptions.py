"""What is said of settings, in --help and in docs/settings.md; knows no service's settings."""

import inspect
import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared.kinds import HEADINGS, Heading, Only


def arranged(model: type[BaseModel]) -> dict[Heading | None, list[str]]:
    """The settings below each heading, in the order of help; None: those without heading, of one command."""
    names = dict.fromkeys([*_declared(model), *model.model_fields])
    below: dict[Heading | None, list[str]] = {each: [] for each in (None, *Heading)}
    for name in names:
        below[heading(model, name)].append(name)
    return {each: found for each, found in below.items() if found}


def heading(model: type[BaseModel], name: str) -> Heading | None:
    """That with which the setting is marked, or that of a class which declares it; the nearest one."""
    for each in model.__mro__:
        if name in _declared(each):
            marks = each.model_fields[name].metadata  # type: ignore[attr-defined]
            found = [mark for mark in marks if isinstance(mark, Heading)]
            found += [HEADINGS[mark.agent] for mark in marks if isinstance(mark, Only)]
            found += [its] if (its := vars(each).get("heading")) else []
            if found:
                return found[0]
    return None


def description(model: type[BaseModel], name: str) -> str:
    """The setting's documentation on one line, which begins with the agent that alone has a use for it."""
    words = " ".join((model.model_fields[name].description or "").split())
    agents = [mark.agent for mark in model.model_fields[name].metadata if isinstance(mark, Only)]
    agents = agents or [agent for agent, its in HEADINGS.items() if its is heading(model, name)]
    return " ".join([*(f"[{agent}]" for agent in agents), words])


def default(field: FieldInfo) -> str | None:
    """The default as it may be given; None where there is none, or its documentation says it."""
    if field.is_required() or "default: " in (field.description or ""):
        return None
    value = field.get_default(call_default_factory=True)
    return None if value is None else as_text(value)


def as_text(value: Any) -> str:
    """A value as it may be given."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    if isinstance(value, bool | dict):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _declared(each: type) -> list[str]:
    """The settings that a class declares itself."""
    fields = getattr(each, "model_fields", {})
    return [name for name in inspect.get_annotations(each) if name in fields]
