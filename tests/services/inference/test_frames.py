import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.frames import FrameMemory
from services.inference.places import Places
from shared.networks.unroll import next_history, stack_frames


@pytest.mark.parametrize("by_index", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stacks_equal_those_put_together_from_each_slots_history(by_index: bool, data: st.DataObject) -> None:
    stack, shape = data.draw(st.integers(2, 4)), (2, 3)
    groups = [np.arange(0, 3), np.arange(3, 5), np.array([7, 6])]
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    memory = FrameMemory(shape, torch.uint8, stack=stack, device=torch.device("cpu"), by_index=by_index)
    memory.grow(6)
    memory.grow(8)
    histories = torch.zeros((8, stack - 1, *shape), dtype=torch.uint8)
    begun: set[int] = set()
    for _ in range(40):
        chosen = random.permutation(len(groups))[: random.integers(1, len(groups) + 1)]
        slots = np.concatenate([groups[each] for each in chosen])
        is_first = random.random(len(slots)) < 0.1
        is_first |= [int(slot) not in begun for slot in slots]
        begun.update(slots.tolist())
        frames = torch.from_numpy(random.integers(1, 256, (len(slots), *shape)).astype(np.uint8))

        stacks = memory.push(Places(slots, torch.device("cpu")), frames, is_first=is_first)

        first = torch.from_numpy(is_first).unsqueeze(1)
        expected = stack_frames(histories[slots], frames.unsqueeze(1), first)[0]
        assert torch.equal(stacks, expected)
        histories[slots] = next_history(expected)


@pytest.mark.parametrize("by_index", [False, True])
def test_neighbours_of_one_that_is_a_frame_ahead_keep_their_own_places(by_index: bool) -> None:
    memory = FrameMemory((1,), torch.uint8, stack=2, device=torch.device("cpu"), by_index=by_index)
    memory.grow(3)

    def push(frames: dict[int, int], is_first: bool) -> list[list[int]]:
        slots, new = np.array([*frames]), torch.tensor([[frame] for frame in frames.values()]).byte()
        places = Places(slots, torch.device("cpu"))
        stacks = memory.push(places, new, is_first=np.full(len(slots), is_first))
        return stacks.flatten(1).tolist()  # type: ignore[no-any-return]

    assert push({0: 1, 1: 2, 2: 3}, True) == [[0, 1], [0, 2], [0, 3]]
    assert push({1: 4}, False) == [[2, 4]]
    assert push({0: 5, 1: 6, 2: 7}, False) == [[1, 5], [4, 6], [3, 7]]
    assert push({0: 8, 1: 9, 2: 10}, False) == [[5, 8], [6, 9], [7, 10]]


@pytest.mark.parametrize("name", ["uint8", "uint16", "float32", "bool"])
def test_frames_of_other_dtypes_keep_them(name: str) -> None:
    frames = torch.from_numpy(np.ones((2, 3), name))
    memory = FrameMemory((3,), frames.dtype, stack=2, device=torch.device("cpu"))
    memory.grow(2)

    stacks = memory.push(Places(np.arange(2), torch.device("cpu")), frames, is_first=np.ones(2, np.bool_))

    assert stacks.dtype == frames.dtype
    assert (
        stacks.view(torch.int16 if name == "uint16" else frames.dtype).sum(dim=1).tolist() == [[1, 1, 1]] * 2
    )
