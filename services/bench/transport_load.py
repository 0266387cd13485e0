"""A process that sends recorded steps over a few streams, as an actor does, and times the answers.

It says `ready` once every stream was answered, is then told `begin end` on its standard input, and writes the
window's latencies as JSON; both times are those of the system's monotonic clock. It ends when its input does.
"""

import asyncio
import secrets
import sys
import time
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import orjson

from services.actor import messages
from services.actor.config import ActorConfig
from services.actor.group import Backoff
from services.actor.local import LocalOffer, offered
from services.actor.stepping import Transition
from services.actor.stream import InferenceStream, StreamEnded, Stub, connected
from services.bench.transport_frames import recorded_steps
from shared.bus.beside import beside
from shared.errors import ConnectionFailed, Refused
from shared.runtime import run_service, run_until_stopped
from shared.specs import EnvironmentSpec, LeafSpec
from shared.types import Array
from shared.wire import inference_pb2 as pb

_CONNECT_SECONDS = 60.0
_GRACE_SECONDS = 2.0


class LoadPlan(NamedTuple):
    """What a load process is told."""

    address: str
    run_id: str
    frames: str  # path
    observation: tuple[int, ...]
    num_actions: int
    group_size: int
    streams: int
    shared_memory: bool

    @property
    def spec(self) -> EnvironmentSpec:
        """Of the environments that there would be."""
        leaf = LeafSpec(
            name="observation", dtype="uint8", shape=tuple(self.observation), low=(0.0,), high=(255.0,)
        )
        return EnvironmentSpec(observation=(leaf,), num_actions=self.num_actions)


class LoadResult(NamedTuple):
    """What a load process tells in the end."""

    latencies: list[float]  # seconds, of each message that was answered within the window
    pipes: bool  # whether the messages of all its streams went through pipes


class Player:
    """One stream: sends the steps over and over, each as soon as the one before is answered."""

    def __init__(self, plan: LoadPlan, steps: list[Transition]) -> None:
        self._plan = plan
        self._steps = steps
        self._config = ActorConfig.model_validate(
            {
                "env": "ALE/Pong-v5",
                "inference_url": plan.address,
                "run_id": plan.run_id,
                "group_size": plan.group_size,
                "shared_memory": plan.shared_memory,
            }
        )
        self.answered = asyncio.Event()
        self.pipes = False  # whether messages go through them
        self.end = float("inf")
        self.timings: list[tuple[float, float]] = []  # when an answer came, and after how many seconds

    async def play(self, stub: Stub) -> None:
        """Until `end`. Raises Refused, ProtocolError, ConnectionFailed."""
        deadline, backoff = time.monotonic() + _CONNECT_SECONDS, Backoff()
        while True:
            async with InferenceStream(stub) as stream:
                stream_id = secrets.token_hex(8)
                with offered(self._config, self._plan.spec, stream_id=stream_id) as local:
                    try:
                        await self._welcomed(stream, stream_id, local)
                    except StreamEnded as ended:
                        if ended.code is not grpc.StatusCode.UNAVAILABLE:
                            raise Refused(f"inference refused the stream: {ended.details}") from ended
                        if time.monotonic() > deadline:
                            raise ConnectionFailed(f"no inference at {self._plan.address}") from ended
                    else:
                        await self._alternate(stream, local.leaves[0] if local.leaves else None)
                        return
            await asyncio.sleep(backoff.seconds())

    async def _welcomed(self, stream: InferenceStream, stream_id: str, local: LocalOffer) -> None:
        plan = self._plan
        hello = messages.hello(self._config, plan.spec, stream_id=stream_id, shared_memory=local.message)
        await stream.send(hello)
        response = await _received(stream)
        messages.check_welcome(response, run_id=plan.run_id)
        local.settle(response.welcome)
        stream.use(local.pipes)
        self.pipes = local.pipes is not None
        if plan.shared_memory and local.leaves is None:
            raise Refused("there is no shared memory between the processes here; use --no-shared-memory")

    async def _alternate(self, stream: InferenceStream, shared: Array | None) -> None:
        sequence = 0
        while (sent := time.monotonic()) < self.end:
            step = self._steps[sequence % len(self._steps)]
            if shared is not None:
                shared[...] = np.frombuffer(step.observation[0], shared.dtype).reshape(shared.shape)
                step = step._replace(observation=[])
            await stream.send(messages.step(sequence, step))
            response = await _received(stream)
            messages.actions(
                response,
                sequence=sequence,
                group_size=self._plan.group_size,
                num_actions=self._plan.num_actions,
            )
            now = time.monotonic()
            self.timings.append((now, now - sent))
            self.answered.set()
            sequence += 1


async def _received(stream: InferenceStream) -> pb.ActResponse:
    response = await stream.receive()
    if response is None:
        raise ConnectionFailed("inference ended the stream")
    return response


async def _load(plan: LoadPlan) -> None:
    steps = recorded_steps(Path(plan.frames), observation=tuple(plan.observation), group_size=plan.group_size)
    players = [Player(plan, steps) for _ in range(plan.streams)]
    instructions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(instructions), sys.stdin
    )
    window: asyncio.Future[tuple[float, float]] = asyncio.get_running_loop().create_future()
    async with (
        connected(plan.address) as stub,
        beside(_instructed(instructions, window)),
        asyncio.TaskGroup() as group,
    ):
        for player in players:
            group.create_task(player.play(stub))
        for player in players:
            await player.answered.wait()
        print("ready", flush=True)
        begin, end = await window
        for player in players:
            player.end = end
    latencies = [seconds for player in players for now, seconds in player.timings if begin <= now < end]
    result = LoadResult(latencies, pipes=all(player.pipes for player in players))
    print(orjson.dumps(result._asdict()).decode())


async def _instructed(
    instructions: asyncio.StreamReader, window: "asyncio.Future[tuple[float, float]]"
) -> None:
    """Hears of the window; raises ConnectionFailed when nobody is there any more to tell, or to be told."""
    if line := await instructions.readline():
        begin, end = map(float, line.split())
        window.set_result((begin, end))
        await instructions.read()
    raise ConnectionFailed("who measures is gone")


def main() -> int:
    """Runs the plan that stands, as JSON, in the first argument."""
    plan = LoadPlan(*orjson.loads(sys.argv[1]))
    return run_service(lambda stop: run_until_stopped(_load(plan), stop=stop), grace_seconds=_GRACE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
