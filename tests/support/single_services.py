"""The services of one run started one by one, as on hosts without a supervisor; each has a log of its own."""

import asyncio
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from nats.js.errors import NotFoundError

from services.learner.accounts import Accounts, load_accounts
from services.parent_death import ending_with_this_process
from services.replay.accounts import load_accounts as replay_accounts
from shared.accounts import MessageAccounts
from shared.addresses import free_port
from shared.bus.connection import connected_bus
from shared.bus.work_queue import queue_state
from shared.config import NatsSettings
from shared.wire.chunks import decode_chunk
from tests.support.commands import command, environment
from tests.support.hosts import Host

NATS_PORT, HTTP_PORT, GRPC_PORT = 4222, 8080, 50051
RUN = "by-hand"


@dataclass
class Service:
    """A running process; `http` is where it answers, on `host` if it has one."""

    process: "subprocess.Popen[bytes]"
    log: Path
    http: str
    host: Host | None
    was_ended: bool = False  # by the test

    def status(self) -> dict[str, Any]:
        """/status; empty while it does not answer."""
        return dict(orjson.loads(self.get("/status") or b"{}"))

    def get(self, path: str) -> bytes:
        """What it answers, whatever the HTTP status; b"" while it does not."""

        def fetched() -> bytes:
            try:
                with urllib.request.urlopen(f"http://{self.http}{path}", timeout=3) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                return error.read()
            except OSError:
                return b""

        return self.host.inside(fetched) if self.host is not None else fetched()

    @property
    def has_ended_by_itself(self) -> bool:
        return not self.was_ended and self.process.poll() is not None

    def end(self, number: signal.Signals = signal.SIGTERM, *, seconds: float = 20.0) -> int:
        """Sends a signal, waits for the end; the exit status."""
        self.was_ended = True
        self.process.send_signal(number)
        return self.process.wait(seconds)


class SingleServices:
    """Starts services of the run `RUN` in `directory`, which is the working directory of all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "runs" / RUN
        self._ports: set[int] = set()
        self.nats_url = f"nats://127.0.0.1:{self._port()}"
        self.inference_url = f"127.0.0.1:{self._port()}"
        self.nats_host: Host | None = None
        self._started: list[Service] = []

    def _port(self) -> int:
        """A free port that none of these services was given: it may not listen on its own yet."""
        while (port := free_port()) in self._ports:
            pass
        self._ports.add(port)
        return port

    def nats(self, host: Host | None = None) -> Service:
        """nats-server with its store in the directory."""
        self.nats_host = host
        if host is not None:
            self.nats_url = f"nats://{host.address}:{NATS_PORT}"
        address, _, port = self.nats_url.removeprefix("nats://").rpartition(":")
        server = str(Path(sys.executable).with_name("nats-server"))
        store = str(self.directory / "nats")
        return self._start("nats", [server, "-js", "-sd", store, "-a", address, "-p", port], host)

    def start(self, name: str, *words: str | Path, host: Host | None = None) -> Service:
        """`seedrl name` of this run; inference listens where the actors look for it."""
        http = (
            f"{host.address}:{HTTP_PORT + len(self._started)}"
            if host is not None
            else f"127.0.0.1:{self._port()}"
        )
        http_host, _, http_port = http.rpartition(":")
        where = ["--run-id", RUN, "--http-host", http_host, "--http-port", http_port, "--log-format", "json"]
        if name != "actor":
            where += ["--nats-url", self.nats_url]
        if name == "inference":
            if host is not None:
                self.inference_url = f"{host.address}:{GRPC_PORT}"
            address, _, port = self.inference_url.rpartition(":")
            where += ["--host", address, "--port", port]
        if name == "actor":
            where += ["--inference-url", self.inference_url]
        return self._start(name, command(name, *words, *where), host, http)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in self._logs())

    def until(self, condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> Any:
        """Polls until `condition` gives something true, and returns that; fails when the time is up."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            ended = [each.log.name for each in self._started if each.has_ended_by_itself]
            assert not ended, f"{ended} ended by itself\n{self.logs()}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.logs()}"
            time.sleep(0.02)  # polls files and HTTP; nothing to await
        return result

    def accounts(self) -> Accounts:
        """The learner's journal."""
        return load_accounts(self.run_dir)

    def accounts_of_messages(self) -> MessageAccounts[Any]:
        """The journal of whoever takes the messages: replay, or else the learner."""
        return replay_accounts(self.run_dir / "replay") or self.accounts()

    def until_more_steps(self, count: int, *, seconds: float = 60.0) -> None:
        """Waits until the learner has consumed `count` more steps than now."""
        wanted = self.accounts().steps + count
        self.until(lambda: self.accounts().steps >= wanted, seconds=seconds, what=f"{wanted} steps")

    def assert_exact(self, *, acted: int | None = None, discarded: int = 0) -> dict[str, Any]:
        """Asserts that every message is accounted for, once; returns the chunks' counts.

        With `acted`, the steps that inference saw in all its lives, of which it `discarded` some: every
        step, too. To be called when inference and learner have ended.
        """
        last_sequence, messages, steps_queued = self._queue()
        accounts = self.accounts_of_messages()
        refused = sum(accounts.refused.values())
        published = accounts.earlier_queues + last_sequence
        assert published == accounts.consumed + refused + messages, (last_sequence, messages, accounts)
        assert accounts.refused["lost"] == 0, accounts.refused
        if acted is not None:
            assert acted == accounts.steps + discarded + steps_queued, (accounts.steps, steps_queued)
        return {
            "published": published,
            "trained": accounts.consumed,
            "refused": refused,
            "queued": messages,
        }

    def _queue(self) -> tuple[int, int, int]:
        """Messages ever kept, those there now, and the steps in these."""

        async def look() -> tuple[int, int, int]:
            settings = NatsSettings(nats_url=self.nats_url)
            async with connected_bus(settings, run_id=RUN, name="test", patient=False) as bus:
                state = await queue_state(bus)
                stream, steps, found, sequence = bus.subjects.trajectories_stream, 0, 0, state.last_sequence
                while found < state.messages and sequence > 0:
                    with suppress(NotFoundError):  # acknowledged
                        message = await bus.js.get_msg(stream, sequence)
                        found += 1
                        steps += decode_chunk(message.data or b"").steps
                    sequence -= 1
                return state.last_sequence, state.messages, steps

        def run() -> tuple[int, int, int]:
            return asyncio.run(look())

        return self.nats_host.inside(run) if self.nats_host is not None else run()

    def _logs(self) -> list[Path]:
        return sorted((self.directory / "logs").glob("*.log"))

    def _start(self, name: str, words: list[str], host: Host | None, http: str = "") -> Service:
        (self.directory / "logs").mkdir(exist_ok=True)
        log = self.directory / "logs" / f"{len(self._started)}-{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                host.command(words) if host is not None else words,
                cwd=self.directory,
                env=environment(),
                stdout=output,
                stderr=output,
                preexec_fn=ending_with_this_process(),
            )
        service = Service(process, log, http, host)
        self._started.append(service)
        return service

    def kill_all(self) -> None:
        for service in reversed(self._started):
            if service.process.poll() is None:
                service.process.kill()
            service.process.wait(10)


@contextmanager
def single_services(directory: Path) -> Iterator[SingleServices]:
    """Services started one by one during the block; what still runs at the end is killed."""
    services = SingleServices(directory)
    try:
        yield services
    finally:
        services.kill_all()
