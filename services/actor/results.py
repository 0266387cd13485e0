"""What step() and reset() have to return, and the words where they did not; knows no space and no stream."""

import re
from types import TracebackType
from typing import Any

import numpy as np

_SHOWN = 80  # characters
_PARTS = {
    "step": ("observation", "reward", "terminated", "truncated", "info"),
    "reset": ("observation", "info"),
}
_UNPACKING = re.compile(
    r"(?:not enough|too many) values to unpack \(expected \d+(?:, got (?P<count>\d+))?\)"
    r"|cannot unpack non-iterable (?P<kind>\S+) object"
)


class WrongResult(Exception):
    """An environment returned what neither Gymnasium nor its space says; it counts as crashed."""


def wrong_count(call: str, result: Any) -> WrongResult:
    """The error for a `result` of step or reset (`call`) that has not as many values as it should."""
    if isinstance(result, tuple | list):
        return _wrong_count(call, f"{len(result)} values")
    return _wrong_count(call, f"one value ({type(result).__name__})")


def first_and_info(result: Any) -> tuple[Any, dict[str, Any]]:
    """What reset() returned, taken apart. Raises WrongResult."""
    if not isinstance(result, tuple | list) or len(result) != len(_PARTS["reset"]):
        raise wrong_count("reset", result)
    observation, info = result
    return observation, info


def one_reward(given: Any) -> float:
    """The reward of one environment, also as an array of one. Raises WrongResult where it is no number."""
    if isinstance(given, int | float):
        return float(given)
    try:
        value = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise _no_reward(given) from error
    if value.size != 1 or value.dtype.kind not in "biuf":
        raise _no_reward(given)
    return float(value.reshape(()))


def _no_reward(given: Any) -> WrongResult:
    return WrongResult(f"reward must be one number, not {repr(given)[:_SHOWN]}")


def explained(error: BaseException) -> BaseException:
    """`error`; where a wrapper of Gymnasium could not take a result apart, a WrongResult that says so."""
    call = _unpacking_in_gymnasium(error.__traceback__)
    words = _UNPACKING.fullmatch(str(error)) if call else None
    if words is None or not isinstance(error, TypeError | ValueError):
        return error
    count, kind = words["count"], words["kind"]
    given = f"{count} values" if count else f"one value ({kind})" if kind else "another number of values"
    wrong = _wrong_count(call, given)
    wrong.__cause__ = error
    return wrong


def _wrong_count(call: str, given: str) -> WrongResult:
    parts = _PARTS[call]
    return WrongResult(f"{call}() returned {given} instead of {len(parts)} ({', '.join(parts)})")


def _unpacking_in_gymnasium(traceback: TracebackType | None) -> str:
    """The function of Gymnasium's in which an error was raised, where it is one of those in question."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    frame = traceback.tb_frame
    is_gymnasiums = str(frame.f_globals.get("__name__")).startswith("gymnasium.")
    return frame.f_code.co_name if is_gymnasiums and frame.f_code.co_name in _PARTS else ""
