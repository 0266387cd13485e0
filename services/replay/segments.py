"""Files of chunk rows for snapshots: each row is written once, whatever number of snapshots hold it.

A segment holds the rows that came between two snapshots: their serial numbers and lengths as two arrays in
numpy's format, then their bytes. It is never changed. Knows neither table nor snapshot.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.files import MISSING, sync_directory

_JOINED_BYTES = 4 * 2**20  # written at once; while they are, other threads run
_UNFINISHED = ".unfinished-"
_SUFFIX = ".rows"


class Damaged(Exception):
    """What is wrong with a file."""


class Segment(NamedTuple):
    """A file of rows and the serial numbers that it holds, ascending."""

    file: str
    sha256: str
    serials: NDArray[np.int64]


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: bytes) -> object:
        """Writes all of `data`."""


def write_segment(directory: Path, rows: dict[int, bytes]) -> Segment:
    """Writes rows by their serial; returns once they are on the disk. Raises OSError."""
    serials = np.array(sorted(rows), np.int64)
    lengths = np.array([len(rows[serial]) for serial in serials.tolist()], np.int64)
    path = directory / f"{int(serials[0]):012d}-{secrets.token_hex(4)}{_SUFFIX}"

    def write(sink: Sink) -> None:
        for array in (serials, lengths):
            np.lib.format.write_array(sink, array, allow_pickle=False)
        for data in _joined(rows[serial] for serial in serials.tolist()):
            sink.write(data)

    digest = write_whole(path, write)
    return Segment(path.name, digest, serials)


def read_segment(directory: Path, file: str, sha256: str) -> tuple[Segment, Iterator[tuple[int, bytes]]]:
    """The segment, and its rows by serial. Raises Damaged when it is not what was written, and OSError."""
    path = directory / Path(file).name
    check_hash(path, sha256)
    try:
        opened = path.open("rb")
        serials, lengths = (_array(opened) for _ in range(2))
    except ValueError as error:
        raise Damaged(f"{path.name}: {error}") from error
    if serials.shape != lengths.shape or serials.ndim != 1 or (lengths < 1).any():
        opened.close()
        raise Damaged(f"{path.name} has {serials.shape} serial numbers and {lengths.shape} lengths")
    return Segment(path.name, sha256, serials), _rows(opened, serials, lengths)


def remove_segments(directory: Path, keep: set[str]) -> None:
    """Removes all segments but those, and what writers that died left unfinished."""
    for path in [*directory.glob(f"*{_SUFFIX}"), *directory.glob(f"{_UNFINISHED}*")]:
        if path.name not in keep:
            path.unlink(missing_ok=True)


def write_whole(path: Path, write: Any) -> str:
    """Creates `path` with what `write(sink)` writes, at once and on the disk; its SHA-256. Raises OSError."""
    temporary = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        with temporary.open("wb", buffering=0) as file:
            sink = _Hashing(file)
            write(sink)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return sink.digest.hexdigest()


def check_hash(path: Path, sha256: Any) -> None:
    """Raises Damaged unless the file is there and has that hash, and OSError when it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except MISSING as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error
    if digest != sha256:
        raise Damaged(f"{path.name} does not match its hash")


class _Hashing:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]


def _joined(rows: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    size = 0
    for row in rows:
        pieces.append(row)
        size += len(row)
        if size >= _JOINED_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


def _array(file: BufferedReader) -> NDArray[np.int64]:
    array: NDArray[np.int64] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _rows(
    file: BufferedReader, serials: NDArray[np.int64], lengths: NDArray[np.int64]
) -> Iterator[tuple[int, bytes]]:
    with file:
        for serial, length in zip(serials.tolist(), lengths.tolist(), strict=True):
            data = file.read(length)
            if len(data) != length:
                raise Damaged(f"{Path(file.name).name} ends before its rows")
            yield serial, data
