"""The run directory: which one may be used, and that one `seedrl train` at a time uses it."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from services.learner.accounts import CHECKPOINTS, Accounts, has_begun, load_accounts
from services.local.config import CONFIG_FILE, LOCK_FILE, TrainConfig, write_config, write_file
from services.local.summary import SUMMARY_FILE, forget_discarded
from shared.errors import ConfigurationError, RunError
from shared.run_spec import own_spec
from shared.specs import RunSpec

# What a run leaves that ended before it trained; nobody misses it when the directory is used again.
_OF_A_FAILED_START = frozenset(
    {
        *(CONFIG_FILE, LOCK_FILE, SUMMARY_FILE, "connection.json"),
        *(CHECKPOINTS, "logs", "nats", "replay", "tensorboard"),
    }
)


@contextlib.contextmanager
def used_directory(config: TrainConfig) -> Iterator[Path]:
    """The run directory, made where missing, in use by this process alone during the block.

    Raises RunError when it cannot be written or used, or when there is nothing left to resume.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            _check_unused(directory)
        lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RunError(f"cannot write run directory {directory}: {error.strerror}") from error
    try:
        _take(lock, directory)
        if config.resume:
            _check_unfinished(config, load_accounts(directory))
            _check_same(config)
        else:
            _remove(config.replay_dir)  # of a start that failed: another run would not take it
        yield directory
    finally:
        os.close(lock)


@contextlib.contextmanager
def configured(config: TrainConfig) -> Iterator[None]:
    """The run directory says `config`; what it said before comes back where a resumed run trains nothing.

    It may have been refused for settings that are not the run's, which would keep it from ever going on; and
    the summary of such an end is not that of the run.
    """
    path = config.directory / CONFIG_FILE
    said = [path, config.directory / SUMMARY_FILE] if config.resume else []
    before, steps = {each: each.read_bytes() for each in said if each.exists()}, _steps(config.directory)
    write_config(config, path)
    forget_discarded(config)
    try:
        yield
    finally:
        if _steps(config.directory) == steps:
            for each, content in before.items():
                write_file(each, content)


def newest_update(directory: Path) -> int | None:
    """The update of the newest checkpoint, whole or not; None where there is none."""
    return max((int(path.name.partition("-")[2]) for path in _checkpoints(directory)), default=None)


def _checkpoints(directory: Path) -> list[Path]:
    found = (directory / CHECKPOINTS).glob("checkpoint-*")
    return sorted(path for path in found if path.name.partition("-")[2].isdigit())


def is_used(directory: Path) -> bool:
    """Whether a `seedrl train` uses it now; True also where that cannot be told."""
    try:
        with open(directory / LOCK_FILE, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _steps(directory: Path) -> int | None:
    """Steps trained so far; None where the accounts were damaged meanwhile."""
    try:
        return load_accounts(directory).steps
    except RunError:
        return None


def _check_unused(directory: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    is_ours = CONFIG_FILE in names or names <= {LOCK_FILE}
    if names - _OF_A_FAILED_START or not is_ours or has_begun(directory):
        raise RunError(f"run directory {directory} is not empty; give another one, or --resume")


def _take(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"run directory {directory} is in use by another seedrl train") from None
    except OSError as error:  # some network file systems have no locks
        raise RunError(f"cannot lock run directory {directory}: {error.strerror}") from error


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RunError(f"cannot remove {directory}: {error.strerror}") from error


def _check_same(config: TrainConfig) -> None:
    """Raises ConfigurationError for settings that no run can change, before anything is written."""
    for path in reversed(_checkpoints(config.directory)):
        try:
            spec = RunSpec.from_json((path / "spec.json").read_bytes())
        except (OSError, ConfigurationError):  # the learner says what is wrong with its checkpoints
            continue
        if words := spec.disagreement(own_spec(config, spec.environment)):
            raise ConfigurationError(f"{config.directory} cannot go on with other settings: {words}")
        return


def _check_unfinished(config: TrainConfig, accounts: Accounts) -> None:
    if accounts.steps >= config.total_steps:
        raise RunError(
            f"{config.directory} has trained for {accounts.steps:,} steps already; to go on, "
            f"give more --total-steps than that (now {config.total_steps:,})"
        )
    if 0 < config.max_seconds <= accounts.seconds:
        raise RunError(
            f"{config.directory} has trained for {accounts.seconds:,.0f} s already; to go on, "
            f"give more --max-seconds than that (now {config.max_seconds:g})"
        )
