"""Which steps started an episode: Gymnasium's NEXT_STEP autoreset, and how to be sure of it.

The step that ends an episode returns its last observation; the next one ignores its action and returns the
first observation of the next episode.
"""

from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Info = dict[str, Any]


class EpisodeStarts(Protocol):
    """Tells which rows of a step are an episode's first observation; made anew when all rows are reset."""

    def after(self, info: Info, *, terminated: Flags, truncated: Flags) -> Flags:
        """[B] rows which a step reset; to be asked once per step."""


class StartsAfterEnds:
    """NEXT_STEP by its definition: a row that ended is reset by the next step."""

    def __init__(self, group_size: int) -> None:
        self._ended: Flags = np.zeros(group_size, np.bool_)

    def after(self, info: Info, *, terminated: Flags, truncated: Flags) -> Flags:
        """[B] rows that the step before this one ended; flags that come with a reset mean nothing."""
        del info
        is_first = self._ended
        self._ended = (terminated | truncated) & ~is_first
        return is_first


class StartsByFrameCounter:
    """As ale-py counts: a row was reset where the frames of all earlier episodes became more.

    With lost lives reported as `terminated`, ends do not tell: a lost life is no reset, unless it was the
    last one or fell on the frame limit. Neither do lives (Pong has none), nor a smaller episode frame number
    (up to 30 no-ops may be more frames than a short episode had).
    """

    def __init__(self, info: Info) -> None:
        """Takes the info of the reset."""
        self._earlier_frames = _frames_of_earlier_episodes(info)

    def after(self, info: Info, *, terminated: Flags, truncated: Flags) -> Flags:
        """[B] rows whose emulator began a game in this step."""
        del terminated, truncated
        before, self._earlier_frames = self._earlier_frames, _frames_of_earlier_episodes(info)
        is_first: Flags = self._earlier_frames != before
        return is_first


def _frames_of_earlier_episodes(info: Info) -> NDArray[np.int64]:
    frames: NDArray[np.int64] = info["frame_number"] - info["episode_frame_number"]
    return frames


def episode_starts(env: VectorEnv[Any, Any, Any], info: Info) -> EpisodeStarts:
    """How to tell which rows of `env` a step has reset; `info` came with the reset of all rows."""
    is_native = not isinstance(env.unwrapped, (SyncVectorEnv, AsyncVectorEnv))
    if is_native and {"frame_number", "episode_frame_number"} <= info.keys():
        return StartsByFrameCounter(info)
    return StartsAfterEnds(env.num_envs)


def autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode | None:
    """How `env` resets; None when it does not say.

    ale-py writes its mode into `VectorEnv.metadata`, which every class without metadata of its own shares, so
    the instance's attribute comes first, and inherited metadata says nothing.
    """
    bare = env.unwrapped
    mode = getattr(bare, "autoreset_mode", None)
    if mode is None and bare.metadata is not VectorEnv.metadata:
        mode = bare.metadata.get("autoreset_mode")
    try:
        return None if mode is None else AutoresetMode(mode)
    except ValueError:
        return None
