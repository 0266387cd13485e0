"""Where settings were given, and what is wrong with them in words that say so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError


class Origin(NamedTuple):
    """Settings that were given in one place, as the command line, and what they are called there."""

    values: Mapping[str, Any]
    label: Callable[[str], str]
    preset: Callable[[str], str] | None = None  # the preset that sets it, where it is from one


class Conflict(ValueError):
    """Settings that do not go together.

    `setting` is the one to blame. Where a preset sets it, its user is told so and `advice`.
    """

    def __init__(self, text: str, *, setting: str, advice: str) -> None:
        super().__init__(text)
        self.setting = setting
        self.advice = advice


def mistakes(error: ValidationError, origins: Sequence[Origin], *, secrets: frozenset[str]) -> Iterator[str]:
    """A line for each mistake. `origins`: the first that has a setting is where its value comes from."""
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "int_parsing" and len(problem["loc"]) > 1:
            message = "wants whole numbers with commas between them, such as 64,64"
        if not problem["loc"]:
            yield message + _advice(problem.get("ctx", {}).get("error"), origins)
            continue
        name = str(problem["loc"][0])
        origin = _of(name, origins)
        where = name if origin is None else origin.label(name)
        shown = "" if name in secrets or problem["type"] == "missing" else f" (got {problem['input']!r})"
        yield f"{where}: {message}{shown}"


def _advice(error: object, origins: Sequence[Origin]) -> str:
    if not isinstance(error, Conflict):
        return ""
    origin = _of(error.setting, origins)
    if origin is None or origin.preset is None:
        return ""
    return f"; preset {origin.preset(error.setting)} sets it: {error.advice}"


def _of(name: str, origins: Sequence[Origin]) -> Origin | None:
    return next((origin for origin in origins if name in origin.values), None)
