"""Chunks for tests: any shape, filled with reproducible noise."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from shared.types import Array, Chunk, ChunkHeader

Leaf = tuple[str, str, tuple[int, ...]]  # name, dtype name, shape of one environment's value
State = Sequence[tuple[tuple[int, ...], str]]  # shape of one environment's value, dtype name


def make_run_spec(
    leaves: Sequence[Leaf] = (("observation", "uint8", (4, 4)),),
    *,
    unroll: int = 5,
    actions: int = 3,
    frame_stack: int = 1,
    agent: Agent = "vtrace",
) -> RunSpec:
    observation = tuple(
        LeafSpec(name=name, dtype=dtype, shape=shape, low=(0.0,), high=(1.0,))
        for name, dtype, shape in leaves
    )
    return RunSpec(
        environment=EnvironmentSpec(observation=observation, num_actions=actions),
        network=NetworkSpec(name="mlp", frame_stack=frame_stack),
        agent=agent,
        unroll=unroll,
        reward_clip=0.0,
    )


def make_chunk(
    spec: RunSpec,
    state: State = (),
    *,
    rows: int = 2,
    seed: int = 0,
    noise: bool = True,
    header: dict[str, Any] | None = None,
) -> Chunk:
    """A chunk that fits `spec`; `noise=False` makes frames that compress well."""
    generator = np.random.default_rng(seed)
    steps, stacked = spec.unroll, spec.network.frame_stack - 1

    def filled(dtype: str, *shape: int) -> Array:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = np.frombuffer(generator.bytes(count) if noise else bytes(count), np.uint8)
        if dtype == "bool":
            return (data & 1).astype(bool).reshape(shape)
        return data.view(dtype).reshape(shape).copy()

    leaves = spec.environment.observation
    return Chunk(
        header=ChunkHeader(**(default_header(rows) | (header or {}))),
        observation={leaf.name: filled(leaf.dtype, rows, steps + 1, *leaf.shape) for leaf in leaves},
        history={leaf.name: filled(leaf.dtype, rows, stacked, *leaf.shape) for leaf in leaves if stacked},
        is_first=filled("bool", rows, steps + 1),
        action=filled("int64", rows, steps),
        reward=filled("float32", rows, steps),
        terminated=filled("bool", rows, steps),
        truncated=filled("bool", rows, steps),
        previous_action=filled("int64", rows),
        previous_reward=filled("float32", rows),
        behaviour_logits=(
            filled("float32", rows, steps, spec.environment.num_actions) if spec.agent == "vtrace" else None
        ),
        td_errors=filled("float32", rows, steps) if spec.agent == "r2d2" else None,
        state=tuple(filled(dtype, rows, *shape) for shape, dtype in state),
        weights_version=filled("int64", steps),
        weights_update=filled("int64", steps),
    )


def image_chunk(*, rows: int = 4, noise: bool = False, frame_stack: int = 3) -> Chunk:
    """Small images, large enough to be compressed."""
    spec = make_run_spec([("pixels", "uint8", (24, 24))], unroll=6, frame_stack=frame_stack)
    return make_chunk(spec, [((8,), "float32")], rows=rows, noise=noise)


def default_header(rows: int) -> dict[str, Any]:
    return {
        "run_id": "run",
        "stream_id": "stream-1",
        "actor_id": "host-1",
        "task": "ALE/Pong-v5",
        "network_hash": "0123456789abcdef",
        "number": 7,
        "group_size": rows,
        "first_row": 0,
    }


def arrays_of(chunk: Chunk) -> dict[str, Array]:
    """All arrays of a chunk by a name that says where they stand."""
    arrays: dict[str, Array] = {}
    for field in fields(chunk):
        value = getattr(chunk, field.name)
        if isinstance(value, dict):
            arrays |= {f"{field.name}/{name}": leaf for name, leaf in value.items()}
        elif isinstance(value, tuple):
            arrays |= {f"{field.name}/{number}": leaf for number, leaf in enumerate(value)}
        elif isinstance(value, np.ndarray):
            arrays[field.name] = value
    return arrays


def assert_same_chunk(actual: Chunk, expected: Chunk) -> None:
    """Bit for bit, NaNs included."""
    assert actual.header == expected.header
    mine, theirs = arrays_of(actual), arrays_of(expected)
    assert list(mine) == list(theirs)
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name
