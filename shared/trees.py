"""Nested values with tensors among them, taken apart into tensors by name and JSON with the rest.

Both are data alone, unlike a pickle.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def taken_apart(tree: Any) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of `tree`, and the rest of it, in which they stand by name, as JSON.

    `tree` is dicts (keys str or int), lists, tuples, tensors, numbers, strings, bools and None. Raises
    TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    names = map(str, itertools.count())

    def apart(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name := next(names)] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in (str, int):
                    raise TypeError(f"keys are strings and whole numbers, not {type(key).__name__}")
            return {"items": [[key, apart(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [apart(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"tensors and plain values can be taken apart, not {type(value).__name__}")

    return tensors, json.dumps(apart(tree), indent=2).encode()


def put_together(tensors: Mapping[str, Tensor], structure: bytes) -> Any:
    """What `taken_apart` was given. Raises ValueError when these are not what it returned."""

    def together(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "items":
            return {key: together(item) for key, item in content}
        return {"list": list, "tuple": tuple}[kind](map(together, content))

    try:
        return together(json.loads(structure))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no structure of these tensors: {error!r}") from error
