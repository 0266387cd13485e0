"""What an actor says about itself and its environment, checked; the environment's spec to and from protobuf.

Every ProtocolError names the field as it stands in `inference.proto`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from reprlib import Repr

from shared.errors import ProtocolError
from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.limits import (
    DTYPES,
    MAX_ACTOR_ID_CHARACTERS,
    MAX_DIMENSIONS,
    MAX_GROUP_SIZE,
    MAX_ID_CHARACTERS,
    MAX_LEAF_NAME_CHARACTERS,
    MAX_LEAVES,
    MAX_MESSAGE_BYTES,
    MAX_TASK_CHARACTERS,
    MAX_VALUES,
    STEP_BYTES_BESIDE_OBSERVATION,
)

PROTOCOL_VERSION = 1

_ID = re.compile(f"[A-Za-z0-9_-]{{1,{MAX_ID_CHARACTERS}}}")

# A status travels in HTTP/2 headers, where a hostile name must not fill them.
_short = Repr()
_short.maxstring = 80


def to_proto_observation(spec: EnvironmentSpec) -> list[pb.LeafSpec]:
    """The observation's leaves as they stand in `Hello.observation`, in wire order."""
    return [
        pb.LeafSpec(
            name=leaf.name, dtype=leaf.dtype, shape=leaf.shape, low=leaf.low, high=leaf.high, n=leaf.n
        )
        for leaf in spec.observation
    ]


def environment_from_hello(hello: pb.Hello) -> EnvironmentSpec:
    """The spec of the actor's environment, once every field of `hello` is found valid.

    Bounds that are the same for all elements come out as one number, however they were sent. Raises
    ProtocolError that names the field. Whether the run id is this run's is not checked here.
    """
    _check_identity(hello)
    if not hello.HasField("action"):
        raise ProtocolError("hello.action: missing")
    if not 1 <= hello.action.n <= MAX_VALUES:
        raise ProtocolError(f"hello.action.n: {hello.action.n} actions; there are 1 to {MAX_VALUES}")
    if not 1 <= len(hello.observation) <= MAX_LEAVES:
        raise ProtocolError(
            f"hello.observation: {len(hello.observation)} leaves; there are 1 to {MAX_LEAVES}"
        )
    leaves = tuple(_leaves(hello.observation))
    step_bytes = hello.group_size * (sum(leaf.row_bytes for leaf in leaves) + STEP_BYTES_BESIDE_OBSERVATION)
    if step_bytes > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"hello.group_size: a Step of {hello.group_size} environments has {step_bytes} bytes; "
            f"a message has at most {MAX_MESSAGE_BYTES}"
        )
    return EnvironmentSpec(observation=leaves, num_actions=hello.action.n)


def _check_identity(hello: pb.Hello) -> None:
    """Everything that is not about spaces."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"hello.protocol_version: the actor speaks version {hello.protocol_version}, "
            f"this service version {PROTOCOL_VERSION}"
        )
    for name in ("run_id", "stream_id"):
        value = getattr(hello, name)
        if not _ID.fullmatch(value):
            raise ProtocolError(
                f"hello.{name}: {_shown(value)} is not 1 to {MAX_ID_CHARACTERS} letters, digits, '_' or '-'"
            )
    _check_text("actor_id", hello.actor_id, MAX_ACTOR_ID_CHARACTERS, least=1)
    _check_text("task", hello.task, MAX_TASK_CHARACTERS, least=0)
    if not 1 <= hello.group_size <= MAX_GROUP_SIZE:
        raise ProtocolError(
            f"hello.group_size: {hello.group_size} environments; a group has 1 to {MAX_GROUP_SIZE}"
        )
    if hello.role not in (pb.ROLE_TRAIN, pb.ROLE_EVAL):
        raise ProtocolError(f"hello.role: {hello.role} is neither ROLE_TRAIN (1) nor ROLE_EVAL (2)")


def _leaves(leaves: Sequence[pb.LeafSpec]) -> Iterator[LeafSpec]:
    names: set[str] = set()
    for number, leaf in enumerate(leaves):
        _check_text(f"observation[{number}].name", leaf.name, MAX_LEAF_NAME_CHARACTERS, least=1)
        if leaf.name in names:
            raise ProtocolError(f"hello.observation[{number}].name: {_shown(leaf.name)} stands there twice")
        names.add(leaf.name)
        where = f"hello.observation[{_shown(leaf.name)}]"
        if leaf.dtype not in DTYPES:
            raise ProtocolError(f"{where}.dtype: {_shown(leaf.dtype)} is none of {', '.join(DTYPES)}")
        elements = _elements(where, leaf)
        low, high = (_bounds(f"{where}.{side}", getattr(leaf, side), elements) for side in ("low", "high"))
        if any(below > above for below, above in _pairs(low, high)):
            raise ProtocolError(f"{where}.low: a lower bound is above the upper one")
        _check_discrete(where, leaf, low, high)
        yield LeafSpec(
            name=leaf.name, dtype=leaf.dtype, shape=tuple(leaf.shape), low=low, high=high, n=leaf.n
        )


def _elements(where: str, leaf: pb.LeafSpec) -> int:
    """How many elements the leaf has."""
    shape = list(leaf.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"{where}.shape: {len(shape)} dimensions; there are at most {MAX_DIMENSIONS}")
    if 0 in shape:
        raise ProtocolError(f"{where}.shape: {shape} has a dimension of size 0")
    elements = math.prod(shape)
    if elements > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"{where}.shape: {shape} is {elements} elements; a message has {MAX_MESSAGE_BYTES} bytes"
        )
    return elements


def _bounds(where: str, bounds: Sequence[float], elements: int) -> tuple[float, ...]:
    """One number where all elements share it, else one per element."""
    if len(bounds) not in (1, elements):
        raise ProtocolError(f"{where}: {len(bounds)} numbers; 1 or one per element ({elements}) was expected")
    if any(math.isnan(bound) for bound in bounds):
        raise ProtocolError(f"{where}: holds a NaN")
    distinct = tuple(dict.fromkeys(bounds))
    return distinct if len(distinct) == 1 else tuple(bounds)


def _pairs(low: tuple[float, ...], high: tuple[float, ...]) -> Iterator[tuple[float, float]]:
    count = max(len(low), len(high))
    return zip(
        *(bounds * count if len(bounds) == 1 else bounds for bounds in (low, high)),
        strict=True,
    )


def _check_discrete(where: str, leaf: pb.LeafSpec, low: tuple[float, ...], high: tuple[float, ...]) -> None:
    """A Discrete space is one int64 between 0 and n − 1."""
    if leaf.n == 0:
        return
    if leaf.n > MAX_VALUES:
        raise ProtocolError(f"{where}.n: {leaf.n} values; there are at most {MAX_VALUES}")
    if (leaf.dtype, list(leaf.shape), low, high) != ("int64", [], (0.0,), (float(leaf.n - 1),)):
        raise ProtocolError(
            f"{where}.n: with n = {leaf.n} the leaf is an int64 of shape [] from 0 to {leaf.n - 1}, "
            f"not {leaf.dtype}{list(leaf.shape)} from {_short.repr(low)} to {_short.repr(high)}"
        )


def _check_text(name: str, value: str, limit: int, *, least: int) -> None:
    if not least <= len(value) <= limit or not (value.isprintable() or not value):
        raise ProtocolError(f"hello.{name}: {_shown(value)} is not {least} to {limit} printable characters")


def _shown(value: str) -> str:
    return _short.repr(value)
