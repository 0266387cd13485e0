import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.observations import Observations
from shared.networks.unroll import stack_frames
from shared.types import Array, Leaves
from tests.support.chunks import make_run_spec

ROWS = 3


def history_of(frames: list[Array], first: list[Array], stack: int) -> Array:
    """[B, S, 2] that the newest of all frames so far end, by definition."""
    ended = stack_frames(
        torch.zeros((ROWS, stack - 1, 2), dtype=torch.uint8),
        torch.from_numpy(np.stack(frames, axis=1)),
        torch.from_numpy(np.stack(first, axis=1)),
    )
    newest: Array = ended[-1].numpy()
    return newest


@settings(max_examples=80, deadline=None)
@given(
    stack=st.integers(2, 9),
    unroll=st.integers(1, 9),
    rate=st.floats(0, 1),
    seed=st.integers(0, 1000),
    looks=st.booleans(),
)
def test_stacks_and_chunks_are_those_of_the_whole_history(
    stack: int, unroll: int, rate: float, seed: int, looks: bool
) -> None:
    """`looks`: the policy is on this host and gets each stack."""
    spec = make_run_spec([("pixels", "uint8", (2,))], unroll=unroll, frame_stack=stack)
    random = np.random.default_rng(seed)
    observations = Observations(spec, ROWS)
    frames: list[Array] = []
    first: list[Array] = []
    begin = 0
    cuts: list[tuple[int, Leaves, Leaves, Array]] = []
    for t in range(40):
        frames.append(random.integers(1, 256, (ROWS, 2)).astype(np.uint8))
        first.append((random.random(ROWS) < rate) | (t == 0))
        observations.append({"pixels": frames[-1]}, first[-1])
        if looks:
            np.testing.assert_array_equal(observations.stacks()["pixels"], history_of(frames, first, stack))
        if observations.is_full:
            cuts.append((begin, *observations.cut()))
            begin = t
    assert len(cuts) == 39 // unroll
    for begin, observation, history, is_first in cuts:
        end = begin + unroll + 1
        np.testing.assert_array_equal(observation["pixels"], np.stack(frames[begin:end], axis=1))
        np.testing.assert_array_equal(is_first, np.stack(first[begin:end], axis=1))
        seen = history_of(frames[: begin + 1], first[: begin + 1], stack)
        np.testing.assert_array_equal(history["pixels"], seen[:, :-1])


def test_a_group_that_never_cuts_keeps_its_stacks() -> None:
    spec = make_run_spec([("pixels", "uint8", (2,))], unroll=3, frame_stack=4)
    observations = Observations(spec, ROWS)
    frames: list[Array] = []
    first: list[Array] = []
    for t in range(20):
        frames.append(np.full((ROWS, 2), t + 1, np.uint8))
        first.append(np.array([t == 0, t % 5 == 0, t % 2 == 0]))
        observations.append({"pixels": frames[-1]}, first[-1])
        np.testing.assert_array_equal(observations.stacks()["pixels"], history_of(frames, first, 4))


def test_without_stacking_there_is_no_history() -> None:
    spec = make_run_spec([("pixels", "uint8", (2,))], unroll=1, frame_stack=1)
    observations = Observations(spec, ROWS)
    for t in range(2):
        observations.append({"pixels": np.full((ROWS, 2), t, np.uint8)}, np.full(ROWS, t == 0))
    cut = observations.cut()
    assert cut.history == {}
    assert cut.observation["pixels"][0, :, 0].tolist() == [0, 1]
    assert observations.count == 1
