"""Which directory a run may use, and that one run at a time uses it."""

import contextlib
from contextlib import nullcontext
from pathlib import Path

import pytest

from services.learner.accounts import Accounts
from services.local.config import TrainConfig, write_config
from services.local.directory import configured, newest_update, used_directory
from shared.accounts import write_accounts
from shared.errors import ConfigurationError, RunError
from shared.run_spec import own_spec
from shared.specs import EnvironmentSpec, LeafSpec

BEFORE = '{"discarded_steps": 7}'


def config(directory: Path, *, resume: bool = False, **settings: float) -> TrainConfig:
    return TrainConfig.model_validate(
        {"env": "CartPole-v1", "run_dir": directory, "resume": resume, **settings}
    )


def use(directory: Path, *, resume: bool = False, **settings: float) -> None:
    with used_directory(config(directory, resume=resume, **settings)):
        pass


@pytest.mark.parametrize("end", [RunError, RuntimeError, KeyboardInterrupt, None])
@pytest.mark.parametrize(("resume", "steps", "stays"), [(True, 0, False), (True, 1, True), (False, 0, True)])
def test_a_resume_that_trains_nothing_leaves_configuration_and_summary_as_they_were(
    resume: bool, steps: int, stays: bool, end: type[BaseException] | None, tmp_path: Path
) -> None:
    before, after = config(tmp_path, unroll=7), config(tmp_path, resume=resume, unroll=8)
    write_config(before, tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text(BEFORE)

    def use_it() -> None:
        with configured(after):
            (tmp_path / "summary.json").write_text("after")
            assert "unroll: 8" in (tmp_path / "config.yaml").read_text()
            write_accounts(tmp_path, Accounts(steps=steps).to_json())
            if end is not None:
                raise end

    with contextlib.nullcontext() if end is None else pytest.raises(end):
        use_it()
    assert f"unroll: {8 if stays else 7}" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "summary.json").read_text() == ("after" if stays else BEFORE)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("unroll", "words"), [(20, None), (10, "unroll is 10, the run's is 20")])
def test_a_resume_with_settings_that_no_run_can_change_writes_nothing(
    unroll: int, words: str | None, tmp_path: Path
) -> None:
    environment = EnvironmentSpec(
        observation=(LeafSpec(name="observation", dtype="float32", shape=(4,), low=(0.0,), high=(1.0,)),),
        num_actions=2,
    )
    spec = own_spec(config(tmp_path, unroll=20), environment)
    for update, content in ((0, b"{}"), (20, spec.to_json()), (30, b"damaged")):
        path = tmp_path / f"checkpoints/checkpoint-{update:012d}"
        path.mkdir(parents=True)
        (path / "spec.json").write_bytes(content)
    refused = nullcontext() if words is None else pytest.raises(ConfigurationError, match=words)
    with refused:
        use(tmp_path, resume=True, unroll=unroll)
    assert newest_update(tmp_path) == 30


def test_a_new_directory_is_made(tmp_path: Path) -> None:
    with used_directory(config(tmp_path / "a" / "b")) as directory:
        assert directory == tmp_path / "a" / "b"
        assert directory.is_dir()


def test_a_directory_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    with used_directory(config(tmp_path)):
        (tmp_path / "config.yaml").touch()
        for resume in (False, True):
            with pytest.raises(RunError, match="is in use by another seedrl train"):
                use(tmp_path, resume=resume)
    use(tmp_path, resume=True)


def test_what_a_failed_start_left_may_be_used_again(tmp_path: Path) -> None:
    use(tmp_path)
    use(tmp_path)  # ended before it wrote anything
    for name in ("config.yaml", "connection.json", "summary.json"):
        (tmp_path / name).touch()
    for name in ("logs", "nats", "tensorboard", "checkpoints"):
        (tmp_path / name).mkdir()
    snapshot = tmp_path / "replay" / "snapshot-000000000001-end"
    snapshot.mkdir(parents=True)
    use(tmp_path)
    assert not snapshot.parent.exists(), "another run would refuse it"


def test_a_replay_is_left_as_it_is_where_the_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "replay").mkdir()
    with used_directory(config(tmp_path, resume=True)):
        assert (tmp_path / "replay").is_dir()
        with pytest.raises(RunError, match="is in use by another seedrl train"):
            use(tmp_path)
    (tmp_path / "accounts.json").touch()
    with pytest.raises(RunError, match="is not empty"):
        use(tmp_path)
    assert (tmp_path / "replay").is_dir()


@pytest.mark.parametrize(
    "names",
    [("thesis.txt",), ("config.yaml", "thesis.txt"), ("logs",), ("config.yaml", "accounts.json")],
    ids=" ".join,
)
def test_what_may_be_missed_is_not_written_to(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(RunError, match="is not empty"):
        use(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_directory_with_a_checkpoint_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "checkpoint-000000000000").mkdir(parents=True)
    with pytest.raises(RunError, match="is not empty"):
        use(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write run directory .*/file/x: Not a directory"):
        use(tmp_path / "file" / "x")


def test_a_run_whose_total_is_used_up_is_not_resumed(tmp_path: Path) -> None:
    write_accounts(tmp_path, Accounts(steps=6028, seconds=90.0).to_json())
    with pytest.raises(RunError, match=r"6,028 steps already; .* more --total-steps .*now 6,000"):
        use(tmp_path, resume=True, total_steps=6000)
    with pytest.raises(RunError, match=r"90 s already; .* more --max-seconds .*now 60"):
        use(tmp_path, resume=True, max_seconds=60)
    use(tmp_path, resume=True, total_steps=6029, max_seconds=91)
