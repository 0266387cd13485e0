"""Checkpoints of a run: written whole or not at all, hashed, and data alone: nothing in them is executed.

A checkpoint is a directory `checkpoint-<updates>` with these files::

    spec.json                the run's spec
    model.safetensors        the weights
    optimizer.safetensors    the tensors of the optimizer's state
    optimizer.json           the rest of it (shared.trees)
    rng.safetensors          states of random generators
    counters.json            numbers, `updates` among them
    manifest.json            the SHA-256 of each of these
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import safetensors
import safetensors.torch
from torch import Tensor

from shared.errors import RunError
from shared.files import MISSING, sync_directory
from shared.specs import RunSpec
from shared.trees import put_together, taken_apart

CHECKPOINT_FORMAT_VERSION = 2

_FILES = (
    "spec.json",
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "rng.safetensors",
    "counters.json",
)
_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{12,})(~?)")  # with ~: replaced by another of the same update
_TEMPORARY = ".unfinished-"

log = logging.getLogger(__name__)


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from; all tensors on the CPU."""

    spec: RunSpec
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    counters: dict[str, int | float]
    rng: dict[str, Tensor]
    path: Path


def save_checkpoint(
    directory: Path,
    *,
    spec: RunSpec,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    counters: Mapping[str, int | float],
    rng: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Saves `<directory>/checkpoint-<counters["updates"]>` and returns its path once it is on the disk.

    Another of the same update is replaced. Afterwards all but this and the `keep` − 1 before it are removed,
    and what earlier writers left unfinished. One writer at a time. Raises OSError when it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors, structure = taken_apart(optimizer_state)
    files = {
        "spec.json": spec.to_json(),
        "model.safetensors": weights_to_bytes(weights),
        "optimizer.safetensors": weights_to_bytes(tensors),
        "optimizer.json": structure,
        "rng.safetensors": weights_to_bytes(rng),
        "counters.json": orjson.dumps(dict(counters), option=orjson.OPT_INDENT_2),
    }
    path = directory / f"checkpoint-{counters['updates']:012d}"
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=directory))
    try:
        temporary.chmod(0o755)
        hashes = {name: _sha256(data) for name, data in files.items()}
        for name, data in {**files, _MANIFEST: _manifest(hashes, CHECKPOINT_FORMAT_VERSION)}.items():
            _write(temporary / name, data)
        sync_directory(temporary)
        _put(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory)
    _remove_older(directory, path, keep)
    return path


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    Damaged ones are logged and passed over. Raises RunError when there are no others, when one is whole but
    of another format, and when the disk cannot be read.
    """
    try:
        return _newest_whole(directory)
    except OSError as error:
        raise RunError(f"cannot read the checkpoints in {directory}: {error.strerror or error}") from error


def _newest_whole(directory: Path) -> Checkpoint | None:
    damages = []
    for path in _checkpoints(directory):
        try:
            files = _whole_files(path)
        except _Damaged as damage:
            log.warning("checkpoint %s is damaged and not used: %s", path, damage)
            damages.append(f"{path.name}: {damage}")
            continue
        return _parsed(path, files)
    if damages:
        raise RunError(f"no checkpoint in {directory} is whole: {'; '.join(damages)}")
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is called as a checkpoint is, and is a directory that holds no others.

    Raises RunError where that cannot be told.
    """
    try:
        is_called_so = _NAME.fullmatch(path.name) is not None
        return is_called_so and path.is_dir() and not (path / "checkpoints").is_dir()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that is `path`. Raises RunError when it is unreadable, damaged or of another format."""
    try:
        return _parsed(path, _whole_files(path))
    except _Damaged as damage:
        raise RunError(f"{path} is damaged: {damage}") from damage
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def checkpoint_at(path: Path) -> Checkpoint:
    """The checkpoint that is `path`, or the newest of the run whose directory `path` is. Raises RunError."""
    path = Path(os.path.abspath(path))  # which has a name, also where it is "."
    if is_checkpoint(path):
        return read_checkpoint(path)
    directory = path / "checkpoints"
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        raise RunError(f"{path} holds no run with a checkpoint: there is none in {directory}")
    return checkpoint


def weights_to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors; from any device, in any layout, also when some share their storage."""
    stored: set[int] = set()
    plain = {}
    for name, tensor in weights.items():
        values = tensor.detach().cpu().contiguous()
        address = values.untyped_storage().data_ptr()
        plain[name] = values.clone() if address in stored else values
        stored.add(address)
    return safetensors.torch.save(plain)


def weights_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Raises RunError when `data` is no safetensors file."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"not weights in safetensors format: {error}") from error


def _manifest(hashes: Mapping[str, str], version: int) -> bytes:
    content: dict[str, Any] = {"format_version": version, "sha256": dict(hashes)}
    own = _sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    return orjson.dumps({**content, "manifest_sha256": own}, option=orjson.OPT_INDENT_2)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; at every moment one of old and new can be found."""
    replaced = path.with_name(f"{path.name}~")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first, whole or not."""
    found = [(match, path) for path in _entries(directory) if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda each: (-int(each[0][1]), each[0][2]))
    return [path for _, path in found]


def _entries(directory: Path) -> Iterable[Path]:
    return directory.iterdir() if directory.is_dir() else ()


def _remove_older(directory: Path, newest: Path, keep: int) -> None:
    """Removes what is older than the `keep` up to `newest`; a newer one (of a run taken back) is left."""
    paths = _checkpoints(directory)
    for path in paths[paths.index(newest) + max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)


def _whole_files(path: Path) -> dict[str, bytes]:
    """The files' bytes, checked against the manifest. Raises _Damaged, and OSError."""
    try:
        written = (path / _MANIFEST).read_bytes()
        manifest = orjson.loads(written)
        version, hashes = manifest["format_version"], dict(manifest["sha256"])
        if written != _manifest(hashes, version):
            raise _Damaged(f"{_MANIFEST} does not match its hash")
        if version != CHECKPOINT_FORMAT_VERSION:
            raise RunError(f"{path} has checkpoint format {version}, this is {CHECKPOINT_FORMAT_VERSION}")
        files = {name: (path / name).read_bytes() for name in _FILES}
    except MISSING as error:
        raise _Damaged(f"{Path(error.filename).name}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _Damaged(f"{_MANIFEST} is no manifest ({error!r})") from error
    for name, data in files.items():
        if _sha256(data) != hashes.get(name):
            raise _Damaged(f"{name} does not match its hash")
    return files


def _parsed(path: Path, files: Mapping[str, bytes]) -> Checkpoint:
    def tensors(name: str) -> dict[str, Tensor]:
        try:
            return weights_from_bytes(files[name])
        except RunError as error:
            raise RunError(f"{path / name}: {error}") from error

    try:
        optimizer = put_together(tensors("optimizer.safetensors"), files["optimizer.json"])
    except ValueError as error:
        raise RunError(f"{path / 'optimizer.json'}: {error}") from error
    return Checkpoint(
        spec=RunSpec.from_json(files["spec.json"]),
        weights=tensors("model.safetensors"),
        optimizer=optimizer,
        counters=orjson.loads(files["counters.json"]),
        rng=tensors("rng.safetensors"),
        path=path,
    )
