"""Chunks of an environment that is played at random, as inference cuts and encodes them; knows no stream."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from services.actor.environments import GroupMaker
from services.actor.stepping import SteppedGroup, Transition
from services.inference.assembler import Assembler, ChunkStart, Origin, StepArrays
from services.nats_server import MAX_PAYLOAD_BYTES
from shared.config import AgentSettings
from shared.run_spec import own_spec
from shared.specs import RunSpec
from shared.types import Array, Chunk
from shared.wire.chunks import decode_chunk, encode_chunk, rows_per_message, slice_rows


@dataclass(frozen=True)
class Recording:
    """Encoded messages of one group, in their order."""

    spec: RunSpec
    messages: list[bytes]


def recorded(maker: GroupMaker, settings: AgentSettings, *, run_id: str, chunks: int, seed: int) -> Recording:
    """Plays a group until it has filled `chunks` chunks.

    Recurrent states of the core's size and TD errors are random, so they take the room that real ones do.
    Raises UnsupportedEnvironment and ChunkError.
    """
    group = SteppedGroup(maker, seeds=np.random.SeedSequence(seed))
    try:
        spec = own_spec(settings, group.spec)
        random = np.random.default_rng(seed)
        state = [((settings.lstm_size,), "float32")] * (2 if settings.lstm_size else 0)
        rows = rows_per_message(spec, state, group.size, MAX_PAYLOAD_BYTES)
        cuts = _played(group, spec, run_id, chunks, state_size=settings.lstm_size, random=random)
        messages = [
            encode_chunk(slice_rows(chunk, start, min(start + rows, chunk.rows)))
            for chunk in cuts
            for start in range(0, chunk.rows, rows)
        ]
    finally:
        group.close()
    return Recording(spec, messages)


def renamed(message: bytes, stream_id: str) -> bytes:
    """The same chunk of another stream."""
    chunk = decode_chunk(message)
    return encode_chunk(replace(chunk, header=replace(chunk.header, stream_id=stream_id)))


def _played(
    group: SteppedGroup,
    spec: RunSpec,
    run_id: str,
    chunks: int,
    *,
    state_size: int,
    random: np.random.Generator,
) -> Iterator[Chunk]:
    origin = Origin(run_id=run_id, stream_id="recorded", actor_id="bench", task="", group_size=group.size)
    assembler = Assembler(spec, origin)
    step = _arrays(group.reset(), spec)
    action = np.zeros(group.size, np.int64)
    while True:
        assembler.observe(step)
        start = _start(step, action, state_size, random) if assembler.wants_start else None
        action = random.integers(spec.environment.num_actions, size=group.size)
        cut = assembler.act(
            action=action,
            logits=np.zeros((group.size, spec.environment.num_actions), np.float32),
            weights_version=1,
            weights_update=0,
            start=start,
        )
        if cut is not None:
            errors = random.normal(size=cut.chunk.action.shape).astype(np.float32)
            yield replace(cut.chunk, td_errors=np.where(cut.chunk.reset_steps, np.float32(0), errors))
            if cut.chunk.header.number == chunks - 1:
                return
        step = _arrays(group.step(action), spec)


def _start(step: StepArrays, action: Array, state_size: int, random: np.random.Generator) -> ChunkStart:
    """What a policy saw beside `step`."""
    leaves = 2 if state_size else 0
    return ChunkStart(
        state=tuple(random.normal(size=(len(action), state_size)).astype(np.float32) for _ in range(leaves)),
        previous_action=np.where(step.is_first, 0, action),
        previous_reward=step.reward,
    )


def _arrays(transition: Transition, spec: RunSpec) -> StepArrays:
    rows = len(transition.is_first)
    leaves = spec.environment.observation
    return StepArrays(
        observation={
            leaf.name: np.frombuffer(data, leaf.dtype).reshape(rows, *leaf.shape)
            for leaf, data in zip(leaves, transition.observation, strict=True)
        },
        reward=np.frombuffer(transition.reward, np.float32),
        terminated=np.frombuffer(transition.terminated, np.bool_),
        truncated=np.frombuffer(transition.truncated, np.bool_),
        is_first=np.frombuffer(transition.is_first, np.bool_),
    )
