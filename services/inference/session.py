"""The protocol as one stream sees it: bytes in, checked Hello and Step out. Knows no socket and no policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError

from services.inference.assembler import StepArrays
from services.inference.refusal import Refusal
from shared.errors import ProtocolError
from shared.specs import EnvironmentSpec, LeafSpec
from shared.types import Array
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION, environment_from_hello
from shared.wire.limits import STEP_BYTES_BESIDE_OBSERVATION

Role = Literal["train", "eval"]

_ROLES: dict[int, Role] = {pb.ROLE_TRAIN: "train", pb.ROLE_EVAL: "eval"}
_MOST = float(np.finfo(np.float32).max)
FRAMING_BYTES = 65_536
"""What a Step may have beyond its arrays: field tags, and what later versions may add."""


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What an actor said of a group in its Hello."""

    run_id: str
    actor_id: str
    stream_id: str
    group_size: int
    role: Role
    task: str
    environment: EnvironmentSpec
    shared_memory: pb.SharedMemory = field(default_factory=pb.SharedMemory)  # that was offered, or empty


def read_hello(data: bytes, *, run_id: str) -> Introduction:
    """The first message of a stream. Raises Refusal."""
    request = _parsed(data)
    if request.WhichOneof("message") != "hello":
        raise Refusal("order", "the first message of a stream must be a Hello")
    hello = request.hello
    try:
        environment = environment_from_hello(hello)
    except ProtocolError as error:
        spoken = hello.protocol_version == PROTOCOL_VERSION
        raise Refusal("hello" if spoken else "protocol_version", str(error)) from error
    if hello.run_id != run_id:
        raise Refusal("run_id", f"hello.run_id: {hello.run_id!r}; this service belongs to run {run_id!r}")
    return Introduction(
        run_id=hello.run_id,
        actor_id=hello.actor_id,
        stream_id=hello.stream_id,
        group_size=hello.group_size,
        role=_ROLES[hello.role],
        task=hello.task,
        environment=environment,
        shared_memory=hello.shared_memory,
    )


class StepReader:
    """Checks the Steps of an accepted stream and shows them as arrays."""

    def __init__(
        self, environment: EnvironmentSpec, *, group_size: int, shared: Sequence[Array] | None = None
    ) -> None:
        """`shared`: where observations lie, per leaf [B, …], instead of in the messages."""
        self._leaves = environment.observation
        self._sent_leaves = self._leaves if shared is None else ()
        self._shared = shared
        self._group_size = group_size
        row_bytes = STEP_BYTES_BESIDE_OBSERVATION + sum(leaf.row_bytes for leaf in self._leaves)
        self._max_bytes = FRAMING_BYTES + group_size * row_bytes
        self.sequence = 0  # of the next Step, which is how many were read

    def read(self, data: bytes) -> StepArrays:
        """Read-only views, of the message or of shared memory. Raises Refusal, which names what is wrong."""
        if len(data) > self._max_bytes:
            raise Refusal(
                "size", f"message has {len(data)} bytes; a Step of this group at most {self._max_bytes}"
            )
        request = _parsed(data)
        if request.WhichOneof("message") != "step":
            raise Refusal("order", "after the Welcome every message must be a Step")
        step = request.step
        if step.sequence != self.sequence:
            raise Refusal("sequence", f"sequence is {step.sequence}, expected {self.sequence}")
        arrays = StepArrays(
            observation=self._observation(step),
            reward=self._reward(step.reward),
            terminated=self._flag("terminated", step.terminated),
            truncated=self._flag("truncated", step.truncated),
            is_first=self._flag("is_first", step.is_first),
        )
        self._check_is_first(arrays)
        self.sequence += 1
        return arrays

    def _observation(self, step: pb.Step) -> dict[str, Array]:
        here, expected = len(step.observation), len(self._sent_leaves)
        if here != expected:
            where = "" if self._shared is None else "; it lies in shared memory"
            raise Refusal("leaves", f"observation has {here} leaves, expected {expected}{where}")
        arrays = self._shared or map(self._sent, self._sent_leaves, step.observation)
        return {leaf.name: _checked(leaf, values) for leaf, values in zip(self._leaves, arrays, strict=True)}

    def _sent(self, leaf: LeafSpec, data: bytes) -> Array:
        self._check_bytes(f"observation {leaf.name!r}", data, leaf.row_bytes)
        little_endian = np.dtype(leaf.dtype).newbyteorder("<")
        return np.frombuffer(data, little_endian).reshape(self._group_size, *leaf.shape)

    def _reward(self, data: bytes) -> Array:
        self._check_bytes("reward", data, 4)
        reward = np.frombuffer(data, "<f4")
        finite = np.isfinite(reward)
        if np.count_nonzero(finite) < self._group_size:
            row = int(np.flatnonzero(~finite)[0])
            raise Refusal("reward", f"reward of row {row} is {reward[row]}, expected a finite number")
        return reward

    def _flag(self, name: str, data: bytes) -> Array:
        self._check_bytes(name, data, 1)
        if data.strip(b"\0\1"):
            raise Refusal("flags", f"{name} holds {max(data)}, expected 0 or 1")
        return np.frombuffer(data, np.bool_)

    def _check_bytes(self, name: str, data: bytes, row_bytes: int) -> None:
        expected = self._group_size * row_bytes
        if len(data) != expected:
            raise Refusal(
                "bytes",
                f"{name} has {len(data)} bytes, expected {self._group_size} × {row_bytes} = {expected}",
            )

    def _check_is_first(self, step: StepArrays) -> None:
        if self.sequence == 0 and not step.is_first.all():
            raise Refusal("is_first", "is_first must be 1 in every row at sequence 0")
        if np.count_nonzero(step.is_first) and (step.is_first & (step.terminated | step.truncated)).any():
            raise Refusal(
                "is_first", "a row is is_first and terminated or truncated; no reset ends an episode"
            )


def _checked(leaf: LeafSpec, values: Array) -> Array:
    name = f"observation {leaf.name!r}"
    if values.dtype.kind == "f" and not _fits_float32(values):
        raise Refusal("observation", f"{name} holds a value that is not finite as float32")
    if values.dtype.kind == "b" and (values.view(np.uint8) > 1).any():
        raise Refusal("observation", f"{name} holds a bool that is neither 0 nor 1")
    if leaf.n and ((values < 0) | (values >= leaf.n)).any():
        raise Refusal("observation", f"{name} holds a value outside 0 … {leaf.n - 1}")
    return values


def _fits_float32(values: Array) -> bool:
    """Whether all are finite also in the type that networks compute in."""
    return bool((np.isfinite(values) if values.itemsize <= 4 else np.abs(values) <= _MOST).all())


def _parsed(data: bytes) -> pb.ActRequest:
    try:
        return pb.ActRequest.FromString(data)
    except DecodeError as error:
        raise Refusal("garbage", f"not an ActRequest: {error}") from error
