import errno
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from services.replay.shelf import Shelf
from services.replay.snapshots import SNAPSHOT_FORMAT_VERSION, Snapshot, Snapshots
from shared.errors import RunError
from tests.support.replay_shelves import Messages, shelf_of

BESIDE = {"run_id": "run", "mark": {"effective": 3, "pending": [4]}}
BURN_IN = {"burn_in": 4, "sequence_length": 4}  # items of two chunks, so that some wait for their second


def fill(shelf: Shelf, messages: Messages, count: int) -> None:
    for _ in range(count):
        shelf.insert(messages.next(), now=1.0)


def contents(shelf: Shelf) -> dict[int, tuple[bytes, ...]]:
    sampled = shelf.table.sample(100 * shelf.table.size, now=1.0)
    return dict(zip(sampled.keys.tolist(), sampled.rows, strict=True))


def saved(
    directory: Path, *, snapshots: int = 2, keep: int = 2, capacity: int = 8
) -> tuple[list[Path], list[Shelf]]:
    """Snapshots, each after three more messages, and what the shelf was at each."""
    writer = Snapshots(directory, keep=keep)
    assert writer.latest() is None
    shelf, messages, paths, shelves = shelf_of(replay_capacity=capacity, **BURN_IN), Messages(), [], []
    for _ in range(snapshots):
        fill(shelf, messages, 3)
        state = shelf.state()
        paths.append(writer.save("test", Snapshot(state, BESIDE)))
        shelves.append(shelf_of(state, replay_capacity=capacity, **BURN_IN))
    return paths, shelves


def restored(directory: Path, *, capacity: int = 8) -> Shelf | None:
    snapshot = Snapshots(directory, keep=2).latest()
    return None if snapshot is None else shelf_of(snapshot.state, replay_capacity=capacity, **BURN_IN)


def rows_of(directory: Path) -> set[Path]:
    return set((directory / "rows").glob("*.rows"))


def newest_rows(directory: Path, paths: list[Path]) -> Path:
    """The file of rows that only the newest snapshot has."""
    names = [orjson.loads((path / "manifest.json").read_bytes())["segments"].keys() for path in paths]
    (name,) = names[-1] - names[-2]
    return directory / "rows" / str(name)


def rewritten(path: Path, **changes: Any) -> None:
    """Another manifest, that is right about itself."""
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    content = {**manifest, **changes}
    version = content.pop("format_version")
    del content["manifest_sha256"]
    own = hashlib.sha256(orjson.dumps([content, version], option=orjson.OPT_SORT_KEYS)).hexdigest()
    whole = {"format_version": version, **content, "manifest_sha256": own}
    (path / "manifest.json").write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2))


def test_what_was_saved_is_restored_with_the_limiter_and_whatever_lies_beside(tmp_path: Path) -> None:
    _, shelves = saved(tmp_path)
    snapshot = Snapshots(tmp_path, keep=2).latest()
    assert snapshot is not None
    assert snapshot.beside == BESIDE
    assert snapshot.state.limiter == shelves[-1].limiter.state()
    assert snapshot.state.largest_rows == shelves[-1].largest_rows
    again = shelf_of(snapshot.state, replay_capacity=8, **BURN_IN)
    assert contents(again) == contents(shelves[-1])
    assert again.table.size == 8
    messages = Messages()
    messages.number = 6  # what waits for its second chunk went through the disk too
    assert again.insert(messages.next(), now=2.0).items == 2


def test_nothing_is_restored_where_there_is_nothing(tmp_path: Path) -> None:
    assert Snapshots(tmp_path / "none", keep=2).latest() is None
    (tmp_path / "snapshot-1-short").mkdir()
    (tmp_path / "snapshot-000000000009-a b").mkdir()
    assert Snapshots(tmp_path, keep=2).latest() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b'{"format_version": 1, "manifest_sha256": "0"}')


def replaced(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, empty, foreign, replaced, Path.unlink])
@pytest.mark.parametrize("file", ["index.npz", "manifest.json", "rows"])
def test_a_damaged_snapshot_is_passed_over_in_words_and_the_one_before_is_restored(
    file: str, damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, shelves = saved(tmp_path)
    damaged = newest_rows(tmp_path, paths) if file == "rows" else paths[-1] / file
    damage(damaged)
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == contents(shelves[-2])
    assert again.limiter.state() == shelves[-2].limiter.state()
    said = capsys.readouterr().out
    assert "snapshot is damaged and not used" in said
    assert f"{paths[-1]}" in said
    assert damaged.name in said


def test_after_a_damaged_snapshot_the_next_one_is_whole_and_newer(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path)
    flip(newest_rows(tmp_path, paths))
    writer = Snapshots(tmp_path, keep=2)
    snapshot = writer.latest()
    assert snapshot is not None
    shelf = shelf_of(snapshot.state, replay_capacity=8, **BURN_IN)
    messages = Messages()
    messages.number = 3
    fill(shelf, messages, 4)
    newest = writer.save("again", Snapshot(shelf.state(), BESIDE))
    assert newest.name == "snapshot-000000000003-again"
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == contents(shelf)


def test_rows_that_both_snapshots_need_and_are_damaged_are_refused_and_nothing_is_removed(
    tmp_path: Path,
) -> None:
    paths, _ = saved(tmp_path)
    (shared,) = rows_of(tmp_path) - {newest_rows(tmp_path, paths)}
    flip(shared)
    files = sorted(tmp_path.rglob("*"))
    why = f"{shared.name} does not match its hash"
    said = rf"no snapshot in {tmp_path} is whole \({paths[1].name}: {why}; {paths[0].name}: {why}\); to begin"
    with pytest.raises(RunError, match=said):
        restored(tmp_path)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("what", ["index.npz", "manifest.json", "rows", "the directory"])
def test_a_disk_that_cannot_be_read_is_no_damage(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, shelves = saved(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    unreadable = {"rows": newest_rows(tmp_path, paths), "the directory": tmp_path}.get(what, paths[-1] / what)

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def read(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == unreadable:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return function(path, *arguments, **options)

        return read

    with monkeypatch.context() as patch:
        for name in ("open", "iterdir"):
            patch.setattr(Path, name, failing(getattr(Path, name)))
        with pytest.raises(RunError, match=f"cannot read the snapshots in {tmp_path}: Input/output error"):
            restored(tmp_path)
    assert sorted(tmp_path.rglob("*")) == files
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == contents(shelves[-1])


def test_while_an_older_manifest_cannot_be_read_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, _ = saved(tmp_path)
    files = rows_of(tmp_path)
    read = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path == paths[0] / "manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    leftover = tmp_path / "rows" / "000000000099-left.rows"
    leftover.touch()
    assert restored(tmp_path) is not None
    assert rows_of(tmp_path) == {*files, leftover}
    assert "nothing is removed" in capsys.readouterr().out


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["object array", "bare pickle"])
def test_an_index_that_holds_code_is_damaged_and_not_run_though_its_hashes_are_right(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, shelves = saved(tmp_path)
    trap, index = Trap(tmp_path / "sprung"), paths[-1] / "index.npz"
    with np.load(index, allow_pickle=False) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    sink = io.BytesIO()
    if how == "object array":
        np.savez(sink, allow_pickle=True, **{**content, "item_rows": np.array([trap], object)})
    else:
        pickle.dump(trap, sink)
    index.write_bytes(sink.getvalue())
    rewritten(paths[-1], index=hashlib.sha256(sink.getvalue()).hexdigest())
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == contents(shelves[-2])
    assert "snapshot is damaged and not used" in capsys.readouterr().out
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()


def test_rows_outside_the_directory_are_not_read(tmp_path: Path) -> None:
    paths, shelves = saved(tmp_path / "replay")
    newest = newest_rows(tmp_path / "replay", paths)
    outside = tmp_path / newest.name.replace(".rows", "-other.rows")
    newest.rename(outside)
    segments = orjson.loads((paths[-1] / "manifest.json").read_bytes())["segments"]
    segments[f"../../{outside.name}"] = segments.pop(newest.name)
    rewritten(paths[-1], segments=segments)
    again = restored(tmp_path / "replay")
    assert again is not None
    assert contents(again) == contents(shelves[-2])


def test_a_whole_snapshot_of_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path)
    rewritten(paths[-1], format_version=SNAPSHOT_FORMAT_VERSION + 1)
    with pytest.raises(RunError, match=f"has snapshot format {SNAPSHOT_FORMAT_VERSION + 1}, this is"):
        restored(tmp_path)


def test_a_row_is_written_once_and_goes_when_no_snapshot_needs_it(tmp_path: Path) -> None:
    paths, _ = saved(tmp_path, snapshots=2, capacity=8)
    sizes = [len(orjson.loads((path / "manifest.json").read_bytes())["segments"]) for path in paths]
    assert sizes == [1, 2]
    files = {path: path.stat().st_mtime_ns for path in rows_of(tmp_path)}
    writer = Snapshots(tmp_path, keep=2)
    snapshot = writer.latest()
    assert snapshot is not None
    writer.save("same", snapshot)
    assert {path: path.stat().st_mtime_ns for path in rows_of(tmp_path)} == files
    assert not paths[0].exists()
    shelf, messages = shelf_of(snapshot.state, replay_capacity=8, **BURN_IN), Messages()
    messages.number = 6
    for _ in range(2):
        fill(shelf, messages, 9)
        writer.save("other", Snapshot(shelf.state(), BESIDE))
    assert not rows_of(tmp_path) & files.keys()
    assert len(list(tmp_path.glob("snapshot-*"))) == 2
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == contents(shelf)


def test_what_is_inserted_while_a_snapshot_is_written_is_not_in_it(tmp_path: Path) -> None:
    shelf, messages = shelf_of(replay_capacity=8, **BURN_IN), Messages()
    fill(shelf, messages, 5)
    state, before = shelf.state(), contents(shelf)
    fill(shelf, messages, 20)
    Snapshots(tmp_path, keep=1).save("late", Snapshot(state, BESIDE))
    again = restored(tmp_path)
    assert again is not None
    assert contents(again) == before


_WRITER = """
import sys
from pathlib import Path
from services.replay.snapshots import Snapshot, Snapshots
from tests.support.replay_shelves import Messages, shelf_of
shelf, messages = shelf_of(replay_capacity=8), Messages()
snapshots = Snapshots(Path(sys.argv[1]), keep=2)
snapshots.latest()
while True:
    shelf.insert(messages.next(), now=1.0)
    snapshots.save("test", Snapshot(shelf.state(), {"number": messages.number}))
    print(messages.number, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_whole_snapshot_and_no_rubbish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kill_at in (1, 7, 30):
        words = [sys.executable, "-c", _WRITER, str(tmp_path / str(kill_at))]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == kill_at:
                    process.send_signal(signal.SIGKILL)
                    break
        directory = tmp_path / str(kill_at)
        (directory / ".unfinished-snapshot").mkdir(exist_ok=True)
        for left in (".unfinished-1.rows", "000000000001-00000000.rows"):
            (directory / "rows" / left).write_bytes(b"left behind")
        writer = Snapshots(directory, keep=2)
        snapshot = writer.latest()
        assert not [*directory.glob("**/.unfinished*"), *directory.glob("rows/*-00000000.rows")]
        assert snapshot is not None
        assert snapshot.beside["number"] >= kill_at
        shelf = shelf_of(snapshot.state, replay_capacity=8)
        assert shelf.table.inserts == 2 * snapshot.beside["number"]
        writer.save("next", snapshot)
        assert not [*directory.glob("**/.unfinished*")]
    assert "damaged" not in capsys.readouterr().out
