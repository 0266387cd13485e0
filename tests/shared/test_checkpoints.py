import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared import checkpoints
from shared.checkpoints import (
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    weights_from_bytes,
    weights_to_bytes,
)
from shared.errors import RunError
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

FILES = [
    "spec.json",
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "counters.json",
    "manifest.json",
]
SPEC = RunSpec(
    environment=EnvironmentSpec(
        observation=(LeafSpec(name="x", dtype="float32", shape=(3,), low=(float("-inf"),), high=(1.0,)),),
        num_actions=2,
    ),
    network=NetworkSpec(name="mlp"),
    agent="vtrace",
    unroll=20,
    reward_clip=1.0,
)


def trained(updates: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(updates)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.RMSprop(model.parameters(), momentum=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(directory: Path, updates: int, *, keep: int = 10, **changes: Any) -> Path:
    model, optimizer = trained(updates)
    content: dict[str, Any] = {
        "spec": SPEC,
        "weights": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "counters": {"updates": updates, "steps": 640 * updates, "rate": 0.5},
        "rng": {"cpu": torch.get_rng_state()},
    }
    return save_checkpoint(directory, **{**content, **changes}, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def newest_updates(directory: Path) -> int | float | None:
    checkpoint = latest_checkpoint(directory)
    return None if checkpoint is None else checkpoint.counters["updates"]


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.spec) == (path, SPEC)
    assert checkpoint.counters == {"updates": 7, "steps": 4480, "rate": 0.5}
    model, optimizer = trained(7)
    assert torch.equal(checkpoint.rng["cpu"], torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.weights[name], value)
    fresh = torch.optim.RMSprop(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).parameters())
    fresh.load_state_dict(checkpoint.optimizer)
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict())
    assert names(path) == sorted(FILES)


def test_others_than_its_writer_may_read_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert path.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in path.iterdir())


def test_a_directory_that_is_not_there_or_empty_holds_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None


def test_the_newest_is_the_one_with_most_updates_not_the_last_written(tmp_path: Path) -> None:
    for updates in (999_999_999_999, 1_000_000_000_000, 3):
        save(tmp_path, updates)
    assert newest_updates(tmp_path) == 1_000_000_000_000


def test_an_optimizers_lists_and_tuples_stay_what_they_are(tmp_path: Path) -> None:
    state = {"param_groups": [{"betas": (0.0, 0.9), "lr": 1e-3, "params": [0, 1], "foreach": None}]}
    save(tmp_path, 1, optimizer_state=state)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.optimizer == state


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for updates in range(1, 6):
        save(tmp_path, updates, keep=3)
    assert names(tmp_path) == [f"checkpoint-{updates:012d}" for updates in (3, 4, 5)]


def test_the_one_just_saved_is_kept_beside_a_newer_damaged_one(tmp_path: Path) -> None:
    (save(tmp_path, 9) / "manifest.json").unlink()
    save(tmp_path, 3)
    save(tmp_path, 5, keep=1)
    assert newest_updates(tmp_path) == 5
    assert names(tmp_path) == ["checkpoint-000000000005", "checkpoint-000000000009"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "emptied"])
def test_a_damaged_checkpoint_is_passed_over_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        file.write_bytes(data[:-1] if damage == "truncated" else b"")
    with caplog.at_level(logging.WARNING):
        assert newest_updates(tmp_path) == 1
    assert "checkpoint-000000000002 is damaged" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_where_the_disk_cannot_be_read_no_older_checkpoint_is_taken(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / name).rename(tmp_path / name)
    (newest / name).symlink_to("/proc/self/mem")  # whose first page cannot be read
    with pytest.raises(RunError, match=f"cannot read the checkpoints in {tmp_path}: Input/output error"):
        latest_checkpoint(tmp_path)
    with pytest.raises(RunError, match=f"cannot read {newest}: Input/output error"):
        read_checkpoint(newest)
    (tmp_path / name).replace(newest / name)
    assert newest_updates(tmp_path) == 2


def test_any_flipped_byte_of_the_manifest_is_damage(tmp_path: Path) -> None:
    manifest = save(tmp_path, 2) / "manifest.json"
    data = manifest.read_bytes()
    for position in range(0, len(data), 7):
        manifest.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(RunError, match=r"no checkpoint in .* is whole: checkpoint-0+2: "):
            latest_checkpoint(tmp_path)
    manifest.write_bytes(data.replace(b'"format_version": 2', b'"format_version": 3'))
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole: checkpoint-0+2: "):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_format_is_refused_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as later:
        later.setattr(checkpoints, "CHECKPOINT_FORMAT_VERSION", 3)
        save(tmp_path, 2)
    with pytest.raises(RunError, match="has checkpoint format 3, this is 2"):
        latest_checkpoint(tmp_path)


def test_what_a_crash_left_unfinished_is_ignored_and_later_removed(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    shutil.copytree(whole, tmp_path / ".unfinished-abc")
    (tmp_path / ".unfinished-abc" / "manifest.json").unlink()
    (tmp_path / "notes.txt").write_text("somebody's")
    assert newest_updates(tmp_path) == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-000000000001", "checkpoint-000000000002", "notes.txt"]


def test_a_failure_while_writing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-000000000001"]
    assert newest_updates(tmp_path) == 1


def test_everything_is_on_the_disk_before_the_checkpoint_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(tmp_path, 1)
    assert set(events[: len(FILES)]) == set(FILES)
    assert events[len(FILES) :] == [".unfinished", "rename", tmp_path.name.split("-")[0]]


def test_each_file_is_whole_when_it_is_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        sizes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    path = save(tmp_path, 1)
    assert {name: sizes[name] for name in FILES} == {name: (path / name).stat().st_size for name in FILES}


def test_saving_the_same_update_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4, counters={"updates": 4, "refused": 1})
    save(tmp_path, 4, counters={"updates": 4, "refused": 2})
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.counters["refused"] == 2
    assert names(tmp_path) == ["checkpoint-000000000004"]


def test_a_crash_while_replacing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    save(tmp_path, 4)
    rename = Path.rename

    def crashing(self: Path, target: Path) -> Path:
        if not target.name.endswith("~"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as crash:
        crash.setattr(Path, "rename", crashing)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4)
    assert newest_updates(tmp_path) == 4
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["checkpoint-000000000003", "checkpoint-000000000004"]


class Opener:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def replaced(path: Path, name: str, data: bytes) -> None:
    """Puts `data` in the place of the checkpoint's file `name`, as its writer would have."""
    (path / name).write_bytes(data)
    hashes = json.loads((path / "manifest.json").read_bytes())["sha256"]
    manifest = checkpoints._manifest({**hashes, name: checkpoints._sha256(data)}, 2)
    (path / "manifest.json").write_bytes(manifest)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
def test_loading_executes_no_code(tmp_path: Path, name: str) -> None:
    target = tmp_path / "executed"
    pickled = io.BytesIO()
    torch.save({"state": Opener(target)}, pickled)
    replaced(save(tmp_path / "run", 1), name, pickled.getvalue())
    with pytest.raises(RunError, match=f"{name}: not weights in safetensors format"):
        latest_checkpoint(tmp_path / "run")
    assert not target.exists()


@pytest.mark.parametrize("structure", [b"", b"{}", b'{"tensor": "999"}', b'{"set": []}', b'{"items": [1]}'])
def test_an_optimizer_state_that_does_not_fit_its_tensors_is_named(tmp_path: Path, structure: bytes) -> None:
    replaced(save(tmp_path, 1), "optimizer.json", structure)
    with pytest.raises(RunError, match=r"optimizer\.json: "):
        latest_checkpoint(tmp_path)


def test_an_optimizer_state_that_could_not_be_loaded_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not Opener"):
        save(tmp_path, 1, optimizer_state={"state": Opener(tmp_path)})
    assert latest_checkpoint(tmp_path) is None


def test_weights_survive_their_bytes_in_any_layout() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    weights = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": shared.t(),
        "tied": shared,
        "also tied": shared,
        "tied once more": shared,
        "scalar": torch.tensor(3),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    loaded = weights_from_bytes(weights_to_bytes(weights))
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}"]
)
def test_bytes_that_are_no_weights_are_refused(data: bytes) -> None:
    with pytest.raises(RunError, match="not weights in safetensors format"):
        weights_from_bytes(data)
