"""`seedrl control` with services that do, or do not, what they are told."""

import asyncio
from pathlib import Path

from tests.support.commands import command, environment
from tests.support.learner_runs import Queue, learner_config, learning
from tests.support.nats import NatsRun
from tests.support.waiting import eventually


async def told(nats: NatsRun, verb: str, cwd: Path) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of `seedrl control`."""
    process = await asyncio.create_subprocess_exec(
        *command("control", verb, "--run-id", nats.run_id, "--nats-url", nats.url),
        cwd=cwd,
        env=environment(SEEDRL_NATS_TOKEN=nats.token),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_a_failure_of_a_service_is_the_commands(nats: NatsRun, tmp_path: Path) -> None:
    async with nats.bus() as bus, learning(learner_config(nats, tmp_path)):
        status, output, errors = await told(nats, "checkpoint", tmp_path)
        assert (status, output) == (2, "")
        assert errors.startswith("seedrl: learner ")
        assert errors.endswith(": failed: there is nothing to save before training has begun\n")

        await Queue.created(bus)
        await eventually(lambda: any(tmp_path.glob("checkpoints/checkpoint-*")))
        status, output, errors = await told(nats, "checkpoint", tmp_path)
        assert (status, errors) == (0, "")
        assert output.endswith(": saved checkpoint-000000000000 at update 0\n")
