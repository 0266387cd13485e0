"""connection.json: how other commands reach a local run; there as long as the run goes on."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from services.local.config import CONFIG_FILE
from services.local.directory import is_used
from services.local.reading import is_file, reading
from shared.errors import RunError

CONNECTION_FILE = "connection.json"


@dataclass(frozen=True)
class Connection:
    """How to reach a run."""

    inference_url: str
    nats_token: str | None
    nats_url: str
    pid: int  # of `seedrl train`
    run_id: str


@contextlib.contextmanager
def published_connection(directory: Path, connection: Connection) -> Iterator[None]:
    """Leaves word in `directory` during the block; only the owner may read it."""
    path = directory / CONNECTION_FILE
    path.unlink(missing_ok=True)  # another's permissions go with it
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(orjson.dumps(asdict(connection), option=orjson.OPT_INDENT_2))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def read_connection(directory: Path) -> Connection:
    """How to reach the run in `directory`. Raises RunError when none goes on there."""
    path = directory / CONNECTION_FILE
    if not is_file(path):
        is_run = is_file(directory / CONFIG_FILE)
        raise RunError(
            f"{directory}: no run goes on there" if is_run else f"{directory} is no run's directory"
        )
    if not is_used(directory):
        raise RunError(f"{directory}: no run goes on there; its seedrl train was killed")
    with reading(path):
        return Connection(**orjson.loads(path.read_bytes()))
