"""Array types and the trajectory chunk; knows no encoding and no tensor library."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Leaves = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class ChunkHeader:
    """Where a chunk comes from. One chunk of a group may travel in several messages of `R` rows."""

    run_id: str
    stream_id: str
    actor_id: str
    task: str
    network_hash: str
    number: int  # 0, 1, 2 … within the stream; a gap is visible
    group_size: int  # B, rows of the whole group
    first_row: int  # which of the group's rows the first row here is


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`R` rows of one group's history over `T` steps, batch-major.

    Row `T` of the observations is also row 0 of the next chunk. `reward`, `terminated` and `truncated`
    at `t` are what followed `action[:, t]`. Where `is_first[:, t + 1]`, step `t` is a reset step: its
    action was ignored. `S` is the frame stack: `history` holds the S − 1 frames before row 0 as the
    policy saw them (zeros before an episode's first frame).

    Of `behaviour_logits` and `td_errors` exactly one is there, as the run's agent says. The TD errors are
    target minus online in rescaled space, of the network that acted in both roles, 0 at reset steps; no
    target looks beyond row T.
    """

    header: ChunkHeader
    observation: Leaves  # leaf name -> [R, T + 1, …], newest frames only
    history: Leaves  # leaf name -> [R, S − 1, …]; empty dict when S = 1
    is_first: NDArray[np.bool_]  # [R, T + 1]
    action: NDArray[np.int64]  # [R, T], 0-based
    reward: NDArray[np.float32]  # [R, T], raw
    terminated: NDArray[np.bool_]  # [R, T]
    truncated: NDArray[np.bool_]  # [R, T]
    previous_action: NDArray[np.int64]  # [R], 0 where is_first[:, 0]
    previous_reward: NDArray[np.float32]  # [R], raw, 0 where is_first[:, 0]
    behaviour_logits: NDArray[np.float32] | None = None  # [R, T, A]; V-trace only
    td_errors: NDArray[np.float32] | None = None  # [R, T]; R2D2 only
    state: tuple[Array, ...]  # leaves [R, …]: the recurrent state before row 0
    weights_version: NDArray[np.int64]  # [T], which weights chose the action
    weights_update: NDArray[np.int64]  # [T], the learner's update count of those weights

    @property
    def rows(self) -> int:
        """R, the rows in this chunk."""
        return int(self.is_first.shape[0])

    @property
    def unroll(self) -> int:
        """T, the steps in this chunk."""
        return int(self.action.shape[1])

    @property
    def reset_steps(self) -> NDArray[np.bool_]:
        """[R, T]: where the action was ignored because the next observation starts an episode."""
        return self.is_first[:, 1:]

    @property
    def steps(self) -> int:
        """Environment steps in this chunk; reset steps are none."""
        return int(self.reset_steps.size - self.reset_steps.sum())
