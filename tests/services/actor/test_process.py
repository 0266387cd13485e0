"""An actor as a process of its own: what it imports, how it ends, and what it leaves behind."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import grpc
import pytest

from tests.support.commands import command, environment
from tests.support.scripted_inference import ScriptedInference, scripted_inference
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
SLOW = "tests.support.actor_environments:Slow-v0"
COUNTING = "tests.support.counting_environment:Counting-v0"

RUNNER = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "nats", "safetensors", "zstandard", "tensorboard", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

from services.actor.config import ActorConfig
from services.actor.service import run
from shared.config import load
from shared.runtime import run_service
from shared.telemetry import configure_logging

if __name__ == "__main__":
    config = load(ActorConfig, sys.argv[1:], prog="seedrl actor")
    configure_logging(config.log_level, config.log_format, "actor")
    sys.exit(run_service(lambda stop: run(config, stop=stop), grace_seconds=config.grace_seconds))
"""


@pytest.fixture
async def inference() -> AsyncIterator[ScriptedInference]:
    async with scripted_inference() as server:
        yield server


@contextlib.asynccontextmanager
async def actor_process(
    tmp_path: Path, inference: ScriptedInference, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The runner on the given arguments, without torch and NATS; killed at the end if it is still there."""
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)
    common = ("--inference-url", inference.address, "--group-size", "3", "--log-format", "json")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(runner),
        *arguments,
        *common,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ended(process: asyncio.subprocess.Process, *, within: float = 20) -> tuple[int | None, str]:
    """Exit status and what was said on stderr."""
    async with asyncio.timeout(within):
        _, stderr = await process.communicate()
    return process.returncode, stderr.decode()


def children_of(pid: int) -> list[int]:
    """All living descendants of a process."""
    parents: dict[int, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(directory.name)] = int(parent)
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known and child not in found]
    return found[1:]


def living(pids: list[int]) -> list[int]:
    alive = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                alive.append(pid)
    return alive


@pytest.mark.parametrize(
    "arguments",
    [("CartPole-v1",), ("ALE/Pong-v5",), (COUNTING,), (COUNTING, "--vectorization", "async")],
    ids=["native", "atari", "sync", "async"],
)
async def test_an_actor_needs_neither_torch_nor_nats_and_is_gone_soon_after_sigterm(
    tmp_path: Path, inference: ScriptedInference, arguments: tuple[str, ...]
) -> None:
    async with actor_process(tmp_path, inference, *arguments, "--grace-seconds", "60") as process:
        await eventually(lambda: len(inference.streams) == 2, timeout=60)
        for index in range(2):
            await inference.steps(5, stream=index, timeout=60)
        descendants = children_of(process.pid)
        assert (len(descendants) >= 6) == ("async" in arguments)
        process.terminate()
        status, stderr = await ended(process, within=20)  # two on a machine that does nothing else
    assert status == 0, stderr
    assert "Traceback" not in stderr
    await eventually(lambda: [stream.end for stream in inference.streams] == ["half-closed"] * 2)
    await eventually(lambda: not living(descendants))


HANGS = ("tests.support.actor_environments:Trouble-v0", "--env-kwargs", '{"trouble": "hang", "at": 2}')


# Two threads: else the group that hangs first may keep the other one from its steps.
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [((COUNTING,), 5), ((*HANGS, "--step-threads", "2"), 2)],
    ids=["stepping", "hanging"],
)
async def test_a_killed_actor_leaves_no_environment_processes(
    tmp_path: Path, inference: ScriptedInference, arguments: tuple[str, ...], steps: int
) -> None:
    async with actor_process(tmp_path, inference, *arguments, "--vectorization", "async") as process:
        await inference.steps(steps, timeout=60)
        descendants = children_of(process.pid)
        assert len(descendants) >= 6
        process.kill()
        await process.wait()
        await eventually(lambda: not living(descendants))


async def test_ctrl_c_is_a_quiet_end_for_environments_in_processes_too(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    async with actor_process(tmp_path, inference, COUNTING, "--vectorization", "async") as process:
        await eventually(lambda: len(inference.streams) == 2, timeout=60)
        for index in range(2):
            await inference.steps(5, stream=index, timeout=60)
        for pid in children_of(process.pid):
            os.kill(pid, signal.SIGINT)
        for index in range(2):
            stream = inference.streams[index]
            await inference.steps(len(stream.steps) + 5, stream=index, timeout=60)
            ended_before = stream.flags("terminated")[:-1]
            assert (stream.flags("is_first")[1:] == ended_before).all()  # no group was rebuilt
        process.send_signal(signal.SIGINT)
        status, stderr = await ended(process)
    assert status == 0, stderr
    assert "Traceback" not in stderr
    assert "crashed" not in stderr


async def test_an_environment_that_hangs_does_not_keep_the_process(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    async with actor_process(tmp_path, inference, *HANGS, "--step-timeout", "1") as process:
        status, stderr = await ended(process)
    assert status == 1
    assert stderr.splitlines()[-1].startswith(
        "seedrl: tests.support.actor_environments:Trouble-v0 did not finish a step in 1 s"
    )


async def test_the_end_of_the_run_is_the_end_of_the_process(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    inference.end_after = 5
    async with actor_process(tmp_path, inference, COUNTING) as process:
        status, stderr = await ended(process)
    assert status == 0, stderr
    assert "the run is over" in stderr


async def test_a_refusal_is_one_line_and_its_own_exit_status(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    inference.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "the run has 6 actions, this environment 16")
    async with actor_process(tmp_path, inference, COUNTING) as process:
        status, stderr = await ended(process)
    assert status == 4
    spoken = [line for line in stderr.splitlines() if line.startswith("seedrl: ")]
    words = "INVALID_ARGUMENT: the run has 6 actions, this environment 16"
    assert spoken == [f"seedrl: inference at {inference.address} refused this actor: {words}"]
    assert "Traceback" not in stderr


async def test_an_unknown_environment_is_one_line(tmp_path: Path, inference: ScriptedInference) -> None:
    async with actor_process(tmp_path, inference, "CartPol-v1") as process:
        status, stderr = await ended(process)
    assert status == 2
    assert stderr.splitlines()[-1].startswith(
        "seedrl: unknown environment 'CartPol-v1'; did you mean CartPole-v1"
    )
    assert "Traceback" not in stderr


async def test_a_users_module_in_the_working_directory_is_found(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    (tmp_path / "my_envs.py").write_text(
        "from gymnasium import register\n"
        "register('Mine-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    async with actor_process(tmp_path, inference, "my_envs:Mine-v0", "--vectorization", "async") as process:
        stream = await inference.steps(3, timeout=60)
        assert stream.hello is not None
        assert stream.hello.task == "Mine-v0"
        process.terminate()
        assert (await ended(process))[0] == 0


HANGING = """
import asyncio
from tests.support.scripted_inference import scripted_inference

async def main():
    async with scripted_inference(takes_pipes=True) as inference:
        print(inference.address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.slow  # 20 s: what gRPC's keepalive takes
@pytest.mark.parametrize("way", ["--shared-memory", "--no-shared-memory"])
async def test_an_inference_service_that_hangs_is_noticed(way: str, tmp_path: Path, free_port: int) -> None:
    async with AsyncExitStack() as stack:

        async def started(*words: str) -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                *words, cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            return process

        inference = await started(sys.executable, "-c", HANGING)
        assert inference.stdout is not None
        address = (await inference.stdout.readline()).decode().strip()
        where = ("--inference-url", address, "--http-port", str(free_port), "--groups", "1")
        await started(*command("actor", COUNTING, *where, way))
        http = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{free_port}"))

        async def groups(**expected: bool) -> bool:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                async with http.get("/status") as response:
                    found = (await response.json())["groups"]
                    return [{name: group[name] for name in expected} for group in found] == [expected]
            return False

        pipes = way == "--shared-memory"
        await eventually(lambda: groups(connected=True, pipes=pipes), timeout=20)
        inference.send_signal(signal.SIGSTOP)
        await eventually(lambda: groups(connected=False), timeout=30, what="the stream to be lost")


@pytest.mark.slow
async def test_an_actor_that_was_stopped_for_longer_than_a_step_may_take_goes_on(
    tmp_path: Path, inference: ScriptedInference
) -> None:
    slow = (SLOW, "--env-kwargs", '{"seconds": 0.3}', "--step-timeout", "2", "--step-threads", "1")
    async with actor_process(tmp_path, inference, *slow) as process:
        await eventually(lambda: len(inference.streams) == 2, timeout=60)
        stream = await inference.steps(2, timeout=60)  # while the other group steps
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3)  # longer than a step may take
        process.send_signal(signal.SIGCONT)
        await inference.steps(len(stream.steps) + 3)
        process.terminate()
        status, stderr = await ended(process)
    assert status == 0, stderr
