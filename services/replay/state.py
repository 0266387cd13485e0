"""What a snapshot of the table holds: flat arrays, names and rows; knows no file format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class TableState:
    """A table as it was at one moment. Its rows are the table's own bytes, which never change."""

    arrays: Mapping[str, NDArray[Any]]
    streams: list[str]
    rows: list[bytes]  # by slot; b"" where free

    def array(self, name: str, shape: tuple[int | None, ...], kind: str) -> NDArray[Any]:
        """The array `name`.

        Args:
            name: its name.
            shape: its lengths; None is any.
            kind: of its numbers, as numpy's `dtype.kind`.

        Raises:
            ValueError: it is not there, or another shape or kind.
        """
        array = self.arrays.get(name)
        if array is None:
            raise ValueError(f"the state has no {name}")
        fits = array.ndim == len(shape) and all(
            there == wanted or wanted is None for there, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype.kind != kind:
            raise ValueError(f"the state's {name} is {array.dtype}{list(array.shape)}")
        return array
