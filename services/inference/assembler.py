"""Cuts the history of one group into chunks; knows neither streams, tensors nor messages."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.inference.observations import Observations
from shared.specs import RunSpec
from shared.types import Array, Chunk, ChunkHeader, Leaves


class StepArrays(NamedTuple):
    """What a group sent in one Step: the newest observations and what followed the actions before them."""

    observation: Leaves  # [B, …]
    reward: NDArray[np.float32]  # [B], raw
    terminated: NDArray[np.bool_]  # [B]
    truncated: NDArray[np.bool_]  # [B]
    is_first: NDArray[np.bool_]  # [B]


class ChunkStart(NamedTuple):
    """What the policy saw beside the frames at a chunk's row 0; zero where that row is a first one."""

    state: tuple[Array, ...]  # [B, …] before the step
    previous_action: NDArray[np.int64]  # [B]
    previous_reward: NDArray[np.float32]  # [B], raw


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose history it is."""

    run_id: str
    stream_id: str
    actor_id: str
    task: str
    group_size: int


class Cut(NamedTuple):
    """A chunk that is full; for R2D2 its TD errors are still to be computed from all Q-values."""

    chunk: Chunk
    q_values: NDArray[np.float32] | None  # [B, T + 1, A]; None for V-trace


class Assembler:
    """Takes `observe` and `act` in turn: the group's Step, then the policy's answer to it.

    A chunk leaves at the `act` of its row T, which is row 0 of the next one. `act` needs a `ChunkStart`
    whenever `wants_start`: at the stream's first step and at every row T.
    """

    def __init__(self, spec: RunSpec, origin: Origin) -> None:
        self._spec = spec
        self._origin = origin
        self.observations = Observations(spec, origin.group_size)
        self._network_hash = spec.network_hash
        self._number = 0
        self._buffers, self._logits = self._empty()  # the latter [B, T, A]; R2D2: Q-values
        self._start: ChunkStart | None = None

    @property
    def wants_start(self) -> bool:
        """Whether the answer to the observed step must come with a ChunkStart."""
        return self._start is None or self.observations.is_full

    @property
    def unfinished_steps(self) -> int:
        """Environment steps in the open chunk, lost when the stream ends now."""
        count = self.observations.count
        resets = int(self.observations.is_first[:, 1:count].sum())
        return self._origin.group_size * max(count - 1, 0) - resets

    def observe(self, step: StepArrays) -> None:
        """Copies a Step into the open chunk; the arrays are not kept."""
        self.observations.append(step.observation, step.is_first)
        t, buffers = self.observations.count - 1, self._buffers
        if t > 0:
            buffers.reward[:, t - 1] = step.reward
            buffers.terminated[:, t - 1] = step.terminated
            buffers.truncated[:, t - 1] = step.truncated

    def act(
        self,
        *,
        action: Array,
        logits: Array,
        weights_version: int,
        weights_update: int,
        start: ChunkStart | None,
    ) -> Cut | None:
        """Records the answer to the step, action [B] and logits (R2D2: Q-values) [B, A]."""
        finished = None
        if self.wants_start:
            assert start is not None, "row 0 of a chunk comes with what the policy saw"
            if self._start is not None:
                finished = self._cut(self._start, logits)
            self._start = start
        t, buffers = self.observations.count - 1, self._buffers
        buffers.action[:, t] = action
        self._logits[:, t] = logits
        buffers.weights_version[t] = weights_version
        buffers.weights_update[t] = weights_update
        return finished

    def _cut(self, start: ChunkStart, last: Array) -> Cut:
        """`last`: logits or Q-values of row T."""
        finished, logits = self._buffers, self._logits
        self._buffers, self._logits = self._empty()
        header = ChunkHeader(
            run_id=self._origin.run_id,
            stream_id=self._origin.stream_id,
            actor_id=self._origin.actor_id,
            task=self._origin.task,
            network_hash=self._network_hash,
            number=self._number,
            group_size=self._origin.group_size,
            first_row=0,
        )
        self._number += 1
        fields = {**start._asdict(), **self.observations.cut()._asdict(), **vars(finished)}
        if self._spec.agent == "vtrace":
            return Cut(Chunk(header=header, **fields, behaviour_logits=logits), None)
        q_values = np.concatenate([logits, last[:, np.newaxis]], axis=1)
        return Cut(Chunk(header=header, **fields), q_values)

    def _empty(self) -> tuple["_Buffers", NDArray[np.float32]]:
        shape = (self._origin.group_size, self._spec.unroll, self._spec.environment.num_actions)
        return _Buffers(shape[:2]), np.zeros(shape, np.float32)


class _Buffers:
    """The arrays of one chunk that fill step by step."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """`shape`: [B, T]."""
        self.action = np.zeros(shape, dtype=np.int64)
        self.reward = np.zeros(shape, dtype=np.float32)
        self.terminated = np.zeros(shape, dtype=np.bool_)
        self.truncated = np.zeros(shape, dtype=np.bool_)
        self.weights_version = np.zeros(shape[1], dtype=np.int64)
        self.weights_update = np.zeros(shape[1], dtype=np.int64)
