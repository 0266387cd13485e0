"""How numbers and truth values may be given in a preset, the environment or a command line.

Knows types, no settings. Whatever is not told apart here is the model's to check.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, get_args, get_origin

_SCIENTIFIC = re.compile(r"[+-]?\d[\d_]*(\.\d+)?[eE][+-]?\d{1,2}")
_SCALARS = (bool, int, float, str)


def as_given(value: Any, annotation: Any) -> Any:
    """`value` for a setting of this type, where 1e6 is an integer as well as 1000000 is.

    Raises ValueError for a truth value in a number's place (YAML reads `yes` as one) and the other way round.
    """
    if get_origin(annotation) is tuple and isinstance(value, list | tuple):
        return [as_given(each, get_args(annotation)[0]) for each in value]
    kinds = set(_scalars(annotation))
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        raise ValueError("must be a number, not true or false")
    if isinstance(value, int | float) and not isinstance(value, bool) and kinds == {bool}:
        raise ValueError("must be true or false, not a number")
    if isinstance(value, str) and kinds == {int} and _SCIENTIFIC.fullmatch(value.strip()):
        number = Decimal(value.strip())
        return int(number) if number == number.to_integral_value() else value
    return value


def _scalars(annotation: Any) -> Iterator[type]:
    """The scalar types that a value of this type may have, itself or as one of several."""
    if annotation in _SCALARS:
        yield annotation
    elif get_origin(annotation) not in (tuple, dict, list):
        for argument in get_args(annotation):
            if isinstance(argument, type) or get_args(argument):
                yield from _scalars(argument)
