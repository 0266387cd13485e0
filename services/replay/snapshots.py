"""Snapshots of replay on disk: written whole or not at all, hashed, and read without executing code.

    snapshot-<number>-<name>/index.npz       arrays of the table, in numpy's format
                             manifest.json   everything else, and the SHA-256 of every file
    rows/*.rows                              the rows, in segments that snapshots share

A snapshot writes only the rows that came after the one before it.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import orjson
from numpy.typing import NDArray

from services.replay.segments import (
    Damaged,
    Segment,
    check_hash,
    read_segment,
    remove_segments,
    write_segment,
    write_whole,
)
from services.replay.shelf import ShelfState
from services.replay.state import TableState
from shared.errors import RunError
from shared.files import MISSING, sync_directory
from shared.telemetry import get_logger

SNAPSHOT_FORMAT_VERSION = 1

_NAME = re.compile(r"snapshot-(\d{12,})-[A-Za-z0-9_-]{1,64}")
_UNFINISHED = ".unfinished-snapshot"
_INDEX, _MANIFEST, _ROWS = "index.npz", "manifest.json", "rows"

log = get_logger(__name__)


class Snapshot(NamedTuple):
    """A shelf's state with whatever else belongs to it (plain values)."""

    state: ShelfState
    beside: dict[str, Any]


class Snapshots:
    """The snapshots in one directory; one writer at a time, for one thread at a time."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._rows = directory / _ROWS
        self._keep = keep
        self._segments: list[Segment] = []  # that hold rows of the newest snapshot
        self._number = 0

    def latest(self) -> Snapshot | None:
        """The newest snapshot that is whole; None where there is none at all.

        Damaged ones are logged and passed over. What writers that died have left is removed: the disk may be
        too full for the next snapshot with it. Raises RunError when there are damaged ones alone, when one
        is whole but of another format, and when the disk cannot be read; then nothing is removed.
        """
        try:
            found = _snapshots(self._directory)
            self._number = _number(found[0]) if found else 0
            return self._newest_whole(found)
        except OSError as error:
            words = f"cannot read the snapshots in {self._directory}: {error.strerror or error}"
            raise RunError(words) from error

    def _newest_whole(self, found: Sequence[Path]) -> Snapshot | None:
        damages = []
        for path in found:
            try:
                snapshot = self._read(path)
            except Damaged as damage:
                log.warning("snapshot is damaged and not used", snapshot=str(path), reason=str(damage))
                damages.append(f"{path.name}: {damage}")
                continue
            self._remove_unused(found)
            return snapshot
        if damages:
            raise RunError(
                f"no snapshot in {self._directory} is whole ({'; '.join(damages)}); "
                "to begin with no sequences move its snapshots and rows away, and leave its accounts"
            )
        return None

    def save(self, name: str, snapshot: Snapshot) -> Path:
        """Saves the snapshot `name` and returns its path once it is on the disk.

        Of what it is made of, the rows that are no snapshot's yet are written. Older snapshots than the
        `keep` newest are then removed. Raises OSError when it cannot be written.
        """
        self._rows.mkdir(parents=True, exist_ok=True)
        table = snapshot.state.table
        live = np.array([bool(row) for row in table.rows], np.bool_)
        self._take_in(table.array("row_serials", (len(table.rows),), "i"), live, table.rows)
        index = BytesIO()
        streams = np.frombuffer(orjson.dumps(table.streams), np.uint8)
        np.savez(index, allow_pickle=False, streams=streams, live=live, **table.arrays)
        self._number += 1
        path = self._directory / f"snapshot-{self._number:012d}-{name}"
        self._write(path, index.getvalue(), snapshot)
        self._remove_older()
        return path

    def _take_in(self, serials: NDArray[np.int64], live: NDArray[np.bool_], rows: Sequence[bytes]) -> None:
        """Brings all rows into segments, and drops those segments that no longer hold one."""
        wanted = np.sort(serials[live])
        self._segments = [each for each in self._segments if _holds_any(each.serials, wanted)]
        written = [each.serials for each in self._segments]
        new = live & ~np.isin(serials, np.concatenate([np.zeros(0, np.int64), *written]))
        if new.any():
            slots = np.flatnonzero(new).tolist()
            self._segments.append(
                write_segment(self._rows, {int(serials[slot]): rows[slot] for slot in slots})
            )

    def _write(self, path: Path, index: bytes, snapshot: Snapshot) -> None:
        temporary = self._directory / _UNFINISHED
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        content = {
            "index": write_whole(temporary / _INDEX, lambda sink: sink.write(index)),
            "segments": {each.file: each.sha256 for each in self._segments},
            "limiter": dict(snapshot.state.limiter),
            "largest_rows": snapshot.state.largest_rows,
            "beside": snapshot.beside,
        }
        data = _manifest(content, SNAPSHOT_FORMAT_VERSION)
        write_whole(temporary / _MANIFEST, lambda sink: sink.write(data))
        temporary.rename(path)
        sync_directory(self._directory)

    def _read(self, path: Path) -> Snapshot:
        manifest = _read_manifest(path)
        check_hash(path / _INDEX, manifest["index"])
        try:
            with np.load(path / _INDEX, allow_pickle=False) as arrays:
                index = {name: arrays[name] for name in arrays.files}
            streams = orjson.loads(index.pop("streams").tobytes())
            live = index.pop("live")
            segments, rows = self._read_rows(manifest["segments"], index["row_serials"][live])
            wanted = zip(index["row_serials"].tolist(), live.tolist(), strict=True)
            table = TableState(
                arrays=index, streams=streams, rows=[rows[s] if is_live else b"" for s, is_live in wanted]
            )
        except (KeyError, TypeError, ValueError, EOFError, BadZipFile) as error:
            raise Damaged(f"{error!r}") from error
        self._segments = segments
        log.info("snapshot", path=str(path), rows=len(rows))
        return Snapshot(
            ShelfState(table, manifest["limiter"], int(manifest["largest_rows"])), dict(manifest["beside"])
        )

    def _read_rows(
        self, files: dict[str, str], serials: NDArray[np.int64]
    ) -> tuple[list[Segment], dict[int, bytes]]:
        wanted = set(serials.tolist())
        segments: list[Segment] = []
        rows: dict[int, bytes] = {}
        for file, sha256 in files.items():
            segment, stored = read_segment(self._rows, file, sha256)
            segments.append(segment)
            rows.update((serial, row) for serial, row in stored if serial in wanted)
        if len(rows) != len(wanted):
            raise Damaged(f"{len(wanted) - len(rows)} rows are in no segment")
        return segments, rows

    def _remove_older(self) -> None:
        kept, older = (found := _snapshots(self._directory))[: self._keep], found[self._keep :]
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        self._remove_unused(kept)

    def _remove_unused(self, snapshots: Sequence[Path]) -> None:
        """Removes what is part of none of `snapshots`, nor of the one to come."""
        files = {each.file for each in self._segments}
        for path in snapshots:
            try:
                files |= _read_manifest(path)["segments"].keys()
            except (Damaged, RunError):
                continue
            except OSError as error:
                log.warning("nothing is removed", snapshot=str(path), reason=error.strerror)
                return
        shutil.rmtree(self._directory / _UNFINISHED, ignore_errors=True)
        remove_segments(self._rows, files)


def _holds_any(serials: NDArray[np.int64], wanted: NDArray[np.int64]) -> bool:
    """Whether one of `serials` is among `wanted`; both ascend."""
    places = np.searchsorted(wanted, serials)
    inside = places < len(wanted)
    return bool((wanted[places[inside]] == serials[inside]).any())


def _snapshots(directory: Path) -> list[Path]:
    """Newest first, whole or not."""
    return sorted(_found(directory), key=_number, reverse=True)


def _found(directory: Path) -> Iterator[Path]:
    if directory.is_dir():
        yield from (path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def _number(path: Path) -> int:
    return int(path.name.split("-")[1])


def _manifest(content: dict[str, Any], version: int) -> bytes:
    own = hashlib.sha256(orjson.dumps([content, version], option=orjson.OPT_SORT_KEYS)).hexdigest()
    whole = {"format_version": version, **content, "manifest_sha256": own}
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        written = (path / _MANIFEST).read_bytes()
        content = orjson.loads(written)
        version = content.pop("format_version")
        del content["manifest_sha256"]
        if written != _manifest(content, version):
            raise Damaged(f"{_MANIFEST} does not match its hash")
    except MISSING as error:
        raise Damaged(f"{_MANIFEST}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{_MANIFEST} is no manifest ({error!r})") from error
    if version != SNAPSHOT_FORMAT_VERSION:
        raise RunError(f"{path} has snapshot format {version}, this is {SNAPSHOT_FORMAT_VERSION}")
    return dict(content)
