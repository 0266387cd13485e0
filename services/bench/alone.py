"""A stage in a process of its own, which measures it alone whenever it is asked to."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import orjson

from services.bench.config import PipelineConfig
from services.bench.service_process import last_words
from services.bench.stages import Stage, StageTurn, go_on
from services.local.config import CONFIG_FILE, TrainConfig
from services.local.process import clean_environment, module
from shared.errors import RunError

_READY_SECONDS = 300.0  # torch, environments and the first, slow, batches
_TURN_SECONDS = 60.0  # beside the turn itself: a unit of work that began within it is finished
_END_SECONDS = 5.0


class StageAlone:
    """One stage, warmed up."""

    def __init__(
        self, stage: Stage, process: asyncio.subprocess.Process, log: Path, *, seconds: float
    ) -> None:
        self._stage = stage
        self._log = log
        self._process = process
        self._seconds = seconds

    async def turn(self, beside: Sequence[int]) -> StageTurn:
        """One turn, in which the processes `beside` stand still. Raises RunError."""
        try:
            return await self._asked(beside, _TURN_SECONDS + self._seconds)
        finally:
            go_on(beside)  # also where the stage was killed, or nobody waits for it any more

    async def ready(self) -> None:
        """Waits until the first turn is done, which does not count. Raises RunError."""
        await self._asked((), _READY_SECONDS)

    async def end(self) -> None:
        """It ends when nobody asks any more, and lets go what stands still."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _asked(self, beside: Sequence[int], seconds: float) -> StageTurn:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(orjson.dumps(beside) + b"\n")
        try:
            async with asyncio.timeout(seconds):
                answer = await self._process.stdout.readline()
        except TimeoutError as error:
            raise RunError(f"stage {self._stage} alone did not come to an end in {seconds:g} s") from error
        if not answer:
            raise RunError(f"stage {self._stage} alone failed: {last_words(self._log.read_bytes())}")
        return StageTurn(*orjson.loads(answer))


@asynccontextmanager
async def stage_alone(
    stage: Stage, config: PipelineConfig, training: TrainConfig
) -> AsyncIterator[StageAlone]:
    """Started and warmed up. Raises RunError where that fails."""
    log = training.directory / "logs" / f"stage-{stage}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:  # no pipe, which an environment that prints a lot would fill
        process = await asyncio.create_subprocess_exec(
            *module("services.bench.stages", stage),
            *("--preset", str(training.directory / CONFIG_FILE), "--env", config.env),
            *("--stage-seconds", str(config.stage_seconds)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            env=clean_environment(),
            start_new_session=True,  # Ctrl-C is answered by this process alone
        )
    alone = StageAlone(stage, process, log, seconds=config.stage_seconds)
    try:
        await alone.ready()
        yield alone
    finally:
        await alone.end()
