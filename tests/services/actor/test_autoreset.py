from typing import Any

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from services.actor.autoreset import StartsAfterEnds, StartsByFrameCounter, autoreset_mode, episode_starts
from tests.support.actor_environments import (
    BareVectorEnvironment,
    ChoosingVectorEnvironment,
    NextStepVectorEnvironment,
    SameStepVectorEnvironment,
)
from tests.support.counting_environment import CountingVectorEnvironment


def flags(*values: int) -> Any:
    return np.array(values, np.bool_)


def test_the_step_after_an_end_starts_an_episode() -> None:
    starts = StartsAfterEnds(3)
    assert starts.after({}, terminated=flags(1, 0, 0), truncated=flags(0, 1, 0)).tolist() == [0, 0, 0]
    assert starts.after({}, terminated=flags(0, 0, 1), truncated=flags(0, 0, 0)).tolist() == [1, 1, 0]
    assert starts.after({}, terminated=flags(0, 0, 0), truncated=flags(0, 0, 0)).tolist() == [0, 0, 1]


def frames(total: list[int], episode: list[int]) -> dict[str, Any]:
    return {"frame_number": np.array(total, np.int32), "episode_frame_number": np.array(episode, np.int32)}


def test_an_episode_starts_where_the_frames_of_earlier_ones_became_more() -> None:
    starts = StartsByFrameCounter(frames([29, 3], [29, 3]))
    none = flags(0, 0)
    lost_life = starts.after(frames([33, 7], [33, 7]), terminated=flags(1, 0), truncated=none)
    assert lost_life.tolist() == [0, 0]
    goes_on = starts.after(frames([37, 11], [37, 11]), terminated=none, truncated=none)
    assert goes_on.tolist() == [0, 0]
    # The second row's new episode has had more frames (no-ops) than its old one: 30 against 11.
    new = starts.after(frames([41, 41], [41, 30]), terminated=none, truncated=none)
    assert new.tolist() == [0, 1]


def test_the_frame_counter_may_overflow() -> None:
    most = 2**31 - 1
    starts = StartsByFrameCounter(frames([most - 2], [100]))
    assert not starts.after(frames([-(2**31) + 1], [104]), terminated=flags(0), truncated=flags(0)).any()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: CountingVectorEnvironment(2), StartsByFrameCounter),
        (lambda: NextStepVectorEnvironment(2), StartsAfterEnds),
        (lambda: ChoosingVectorEnvironment(2), StartsAfterEnds),
    ],
)
def test_frames_are_counted_where_a_native_environment_tells_them(make: Any, kind: type) -> None:
    env = make()
    _, info = env.reset()
    assert type(episode_starts(env, info)) is kind


def test_single_environments_in_a_row_are_never_judged_by_frame_counters() -> None:
    env = ChoosingVectorEnvironment(2, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert type(episode_starts(env, frames([1, 1], [1, 1]))) is StartsAfterEnds


def test_an_instances_own_mode_comes_before_metadata_which_ale_py_shares() -> None:
    before = dict(VectorEnv.metadata)
    try:
        next_step = AtariVectorEnv("pong", 1, autoreset_mode=AutoresetMode.NEXT_STEP)
        same_step = AtariVectorEnv("pong", 1, autoreset_mode=AutoresetMode.SAME_STEP)
        assert next_step.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP  # as said: shared
        assert autoreset_mode(next_step) is AutoresetMode.NEXT_STEP
        assert autoreset_mode(same_step) is AutoresetMode.SAME_STEP
        # What ale-py wrote there does not count for a class that says nothing itself.
        assert BareVectorEnvironment().metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert autoreset_mode(BareVectorEnvironment()) is None
    finally:
        VectorEnv.metadata.clear()
        VectorEnv.metadata.update(before)


def test_metadata_of_a_class_or_an_instance_is_believed() -> None:
    assert autoreset_mode(NextStepVectorEnvironment()) is AutoresetMode.NEXT_STEP
    assert autoreset_mode(SameStepVectorEnvironment()) is AutoresetMode.SAME_STEP
    own = BareVectorEnvironment()
    own.metadata = {"autoreset_mode": "NextStep"}
    assert autoreset_mode(own) is AutoresetMode.NEXT_STEP
    own.metadata = {"autoreset_mode": "whenever"}
    assert autoreset_mode(own) is None


def test_gymnasiums_own_vectorizers_say_their_mode() -> None:
    env: SyncVectorEnv = ChoosingVectorEnvironment(1)
    assert autoreset_mode(env) is AutoresetMode.SAME_STEP
