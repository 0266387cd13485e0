"""Trajectory chunks as bytes: which fields a chunk has, their shapes, and how many rows fit a message.

Names on the wire are the chunk's own (`action`, `reward` …), `observation/<leaf>`, `history/<leaf>` and
`state/<number>`. Observations and history are compressed, one environment's frames as one block, since
consecutive frames are nearly equal. `shared.wire.fields` knows the bytes.

Which of `behaviour_logits` and `td_errors` a chunk holds depends on the run's agent. The format version
counts changes after which an older reader would misread a chunk; one that knows no `td_errors` refuses such
a chunk for its lack of logits, so both kinds are version 1 and what lies in a queue stays readable.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from reprlib import repr as shown
from typing import Any

import numpy as np
import orjson

from shared.errors import ChunkError
from shared.specs import Agent, RunSpec
from shared.types import Array, Chunk, ChunkHeader, Leaves
from shared.wire.fields import Field, Layout, decode_fields, encode_fields, raw_bytes, read_meta
from shared.wire.limits import (
    MAX_ACTOR_ID_CHARACTERS,
    MAX_ID_CHARACTERS,
    MAX_MESSAGE_BYTES,
    MAX_TASK_CHARACTERS,
)

CHUNK_FORMAT_VERSION = 1

NATS_HEADERS_BYTES = 512
"""What a message's own headers (its id) may take of NATS's `max_payload`."""

StateShapes = Sequence[tuple[tuple[int, ...], str]]
"""Shape of one environment's value and dtype name, for each leaf of the recurrent state."""

# Longest in bytes of JSON; what Hello accepts has at most four per character.
_TEXTS = {
    "run_id": MAX_ID_CHARACTERS,
    "stream_id": MAX_ID_CHARACTERS,
    "actor_id": 4 * MAX_ACTOR_ID_CHARACTERS,
    "task": 4 * MAX_TASK_CHARACTERS,
    "network_hash": MAX_ID_CHARACTERS,
}
_NUMBERS = ("number", "group_size", "first_row")
_DTYPES = {
    "is_first": "bool",
    "action": "int64",
    "reward": "float32",
    "terminated": "bool",
    "truncated": "bool",
    "previous_action": "int64",
    "previous_reward": "float32",
    "behaviour_logits": "float32",
    "td_errors": "float32",
    "weights_version": "int64",
    "weights_update": "int64",
}
_OF_AGENT: dict[Agent, str] = {"vtrace": "behaviour_logits", "r2d2": "td_errors"}
_AXES: dict[Agent, str] = {"vtrace": "RTA", "r2d2": "RT"}
_EITHER = frozenset(_OF_AGENT.values())


def encode_chunk(chunk: Chunk, *, compress: bool = True) -> bytes:
    """`chunk` as bytes. Raises ChunkError when its fields do not fit each other or are too large.

    Safe to call from several threads at once. `compress=False` stores everything as it is.
    """
    _check_header(chunk.header, chunk.rows)
    arrays = dict(_named_arrays(chunk))
    _check_shapes(arrays)
    compressed = ("observation/", "history/") if compress else ()
    written = [
        Field(name=name, array=array, compress=name.startswith(compressed)) for name, array in arrays.items()
    ]
    return encode_fields(CHUNK_FORMAT_VERSION, asdict(chunk.header), written)


def decode_chunk(data: bytes | memoryview) -> Chunk:
    """The chunk in `data`. Raises ChunkError, and nothing else, on anything that is none.

    What was stored uncompressed is a read-only view of `data`. Safe to call from several threads at once.
    """
    meta, arrays = decode_fields(CHUNK_FORMAT_VERSION, data)
    _check_shapes(arrays)
    header = _parsed_header(meta, len(arrays["is_first"]))
    return Chunk(
        header=header,
        observation=_leaves(arrays, "observation/"),
        history=_leaves(arrays, "history/"),
        state=tuple(_leaves(arrays, "state/").values()),
        **{name: arrays[name] for name in _DTYPES if name in arrays},
    )


def read_header(data: bytes | memoryview) -> ChunkHeader:
    """Only where the chunk in `data` comes from; no array is looked at. Raises ChunkError."""
    return _parsed_header(read_meta(CHUNK_FORMAT_VERSION, data), rows=1)


def slice_rows(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Rows `start` up to `stop` as a chunk of their own, as views. Raises ChunkError out of range."""
    if not 0 <= start < stop <= chunk.rows:
        raise ChunkError(f"rows {start} to {stop} of a chunk of {chunk.rows}")
    rows = slice(start, stop)
    by_row = [name for name in _present(chunk) if not name.startswith("weights_")]
    return replace(
        chunk,
        header=replace(chunk.header, first_row=chunk.header.first_row + start),
        observation={name: leaf[rows] for name, leaf in chunk.observation.items()},
        history={name: leaf[rows] for name, leaf in chunk.history.items()},
        state=tuple(leaf[rows] for leaf in chunk.state),
        **{name: getattr(chunk, name)[rows] for name in by_row},
    )


def worst_case_bytes(spec: RunSpec, state_shapes: StateShapes, rows: int) -> int:
    """Bytes of a message of `rows` rows when nothing compresses and every id is as long as it may be."""
    largest: dict[str, Any] = {name: "x" * limit for name, limit in _TEXTS.items()}
    largest |= dict.fromkeys(_NUMBERS, 2**63 - 1)
    return raw_bytes(CHUNK_FORMAT_VERSION, largest, _layout(spec, state_shapes, rows))


def rows_per_message(spec: RunSpec, state_shapes: StateShapes, group_size: int, max_payload: int) -> int:
    """R: the most rows of a group whose message fits NATS's `max_payload` bytes even if nothing compresses.

    Raises ChunkError when not even one row fits.
    """
    limit = min(max_payload - NATS_HEADERS_BYTES, MAX_MESSAGE_BYTES)
    one = worst_case_bytes(spec, state_shapes, 1)
    if one > limit:
        raise ChunkError(
            f"one environment's {spec.unroll} steps take up to {one} bytes, a message has room for "
            f"{max(limit, 0)}: shorten the unroll or raise max_payload of the NATS server"
        )
    fits, too_many = 1, group_size + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if worst_case_bytes(spec, state_shapes, middle) <= limit:
            fits = middle
        else:
            too_many = middle
    return fits


def _named_arrays(chunk: Chunk) -> Iterator[tuple[str, Array]]:
    for name in _present(chunk):
        yield name, getattr(chunk, name)
    for name, leaf in chunk.observation.items():
        yield f"observation/{name}", leaf
    for name, leaf in chunk.history.items():
        yield f"history/{name}", leaf
    for number, leaf in enumerate(chunk.state):
        yield f"state/{number}", leaf


def _layout(spec: RunSpec, state_shapes: StateShapes, rows: int) -> list[Layout]:
    """Name, dtype and shape of every field of a message of `rows` rows, in the order of `_named_arrays`."""
    shapes = _shapes(rows, spec.unroll, spec.environment.num_actions, spec.agent)
    layout = [(name, _DTYPES[name], shape) for name, shape in shapes.items()]
    leaves, history = spec.environment.observation, spec.network.frame_stack - 1
    layout += [
        (f"observation/{leaf.name}", leaf.dtype, (rows, spec.unroll + 1, *leaf.shape)) for leaf in leaves
    ]
    if history:
        layout += [(f"history/{leaf.name}", leaf.dtype, (rows, history, *leaf.shape)) for leaf in leaves]
    layout += [
        (f"state/{number}", np.dtype(dtype).name, (rows, *shape))
        for number, (shape, dtype) in enumerate(state_shapes)
    ]
    return layout


def _present(chunk: Chunk) -> list[str]:
    """Names of the chunk's own fields that are there."""
    return [name for name in _DTYPES if getattr(chunk, name) is not None]


def _shapes(rows: int, unroll: int, actions: int, agent: Agent) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields that every chunk of an agent has: R rows, T steps, A actions."""
    step = (rows, unroll)
    shapes: dict[str, tuple[int, ...]] = {
        "is_first": (rows, unroll + 1),
        "action": step,
        "reward": step,
        "terminated": step,
        "truncated": step,
        "previous_action": (rows,),
        "previous_reward": (rows,),
        "behaviour_logits": (rows, unroll, actions),
        "td_errors": step,
        "weights_version": (unroll,),
        "weights_update": (unroll,),
    }
    return {name: shape for name, shape in shapes.items() if _OF_AGENT[agent] == name or name not in _EITHER}


def _check_shapes(arrays: dict[str, Array]) -> None:
    """Raises ChunkError unless the fields are those of one chunk and their dtypes and shapes agree."""
    missing = _DTYPES.keys() - _EITHER - arrays.keys()
    if missing:
        raise ChunkError(f"chunk lacks {', '.join(sorted(missing))}")
    agent = _agent_of(arrays)
    own, axes = arrays[_OF_AGENT[agent]].shape, _AXES[agent]
    if len(own) != len(axes):
        raise ChunkError(f"chunk field {_OF_AGENT[agent]!r} has shape {own}, not [{', '.join(axes)}]")
    rows, unroll, actions = (*own, 0)[:3]
    for name, shape in _shapes(rows, unroll, actions, agent).items():
        array = arrays[name]
        if array.shape != shape or array.dtype.name != _DTYPES[name]:
            raise ChunkError(
                f"chunk field {name!r} is {array.dtype}{list(array.shape)}, not {_DTYPES[name]}{list(shape)}"
            )
    _check_leaves(arrays, rows, unroll)


def _agent_of(arrays: dict[str, Array]) -> Agent:
    agents = [agent for agent, name in _OF_AGENT.items() if name in arrays]
    if len(agents) != 1:
        names = list(_OF_AGENT.values())
        raise ChunkError(
            f"chunk has both {' and '.join(names)}" if agents else f"chunk lacks {' or '.join(names)}"
        )
    return agents[0]


def _check_leaves(arrays: dict[str, Array], rows: int, unroll: int) -> None:
    observation, history = _leaves(arrays, "observation/"), _leaves(arrays, "history/")
    state = _leaves(arrays, "state/")
    named = len(_DTYPES.keys() & arrays.keys())
    if named + len(observation) + len(history) + len(state) != len(arrays):
        raise ChunkError(f"chunk has unknown fields among {shown(list(arrays))}")
    if not observation or list(state) != [str(number) for number in range(len(state))]:
        raise ChunkError("chunk has no observation, or its state leaves are not numbered 0, 1, …")
    for name, leaf in observation.items():
        if leaf.shape[:2] != (rows, unroll + 1):
            raise ChunkError(
                f"chunk field 'observation/{name}' has shape {leaf.shape}, not [{rows}, {unroll + 1}, …]"
            )
    if history and list(history) != list(observation):
        raise ChunkError("chunk's history has other leaves than its observation")
    frames = next(iter(history.values())).shape[1:2] if history else ()
    for name, leaf in history.items():
        newest = observation[name]
        if leaf.shape != (rows, *frames, *newest.shape[2:]) or leaf.dtype != newest.dtype or not frames:
            raise ChunkError(f"chunk field 'history/{name}' is {leaf.dtype}{list(leaf.shape)}")
    for name, leaf in state.items():
        if len(leaf) != rows:
            raise ChunkError(f"chunk field 'state/{name}' has {len(leaf)} rows of {rows}")


def _leaves(arrays: dict[str, Array], prefix: str) -> Leaves:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _parsed_header(meta: Any, rows: int) -> ChunkHeader:
    names = {field.name for field in fields(ChunkHeader)}
    if not isinstance(meta, dict) or meta.keys() != names:
        raise ChunkError(f"chunk header does not have the fields {', '.join(sorted(names))}")
    header = ChunkHeader(**meta)
    _check_header(header, rows)
    return header


def _check_header(header: ChunkHeader, rows: int) -> None:
    for name, limit in _TEXTS.items():
        text = getattr(header, name)
        if type(text) is not str or _json_bytes(text) > limit:
            raise ChunkError(f"chunk header: {name} is no text of at most {limit} bytes")
    for name in _NUMBERS:
        number = getattr(header, name)
        if type(number) is not int or not 0 <= number < 2**63:
            raise ChunkError(f"chunk header: {name} is {shown(number)}")
    end = header.first_row + rows
    if end > header.group_size:
        raise ChunkError(f"chunk header: rows {header.first_row} to {end} of a group of {header.group_size}")


def _json_bytes(text: str) -> int:
    """Length within a JSON text, without the quotes."""
    try:
        return len(orjson.dumps(text)) - 2
    except TypeError as error:
        raise ChunkError(f"chunk header: not Unicode: {shown(text)}") from error
