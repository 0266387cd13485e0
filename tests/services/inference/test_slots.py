import numpy as np
import pytest

from services.inference.slots import SlotAllocator


def test_groups_get_the_lowest_contiguous_slots() -> None:
    slots = SlotAllocator(10)
    first, second = slots.allocate(4), slots.allocate(3)
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, [0, 1, 2, 3])
    np.testing.assert_array_equal(second, [4, 5, 6])
    slots.release(first)
    third = slots.allocate(2)
    np.testing.assert_array_equal(third, [0, 1])  # type: ignore[arg-type]


def test_a_group_that_fits_no_gap_gets_scattered_slots() -> None:
    slots = SlotAllocator(6)
    groups = [slots.allocate(2) for _ in range(3)]
    for group in (groups[0], groups[2]):
        assert group is not None
        slots.release(group)
    scattered = slots.allocate(4)
    np.testing.assert_array_equal(scattered, [0, 1, 4, 5])  # type: ignore[arg-type]


def test_a_gap_that_is_just_wide_enough_is_preferred_to_lower_slots_that_are_scattered() -> None:
    slots = SlotAllocator(6)
    groups = [slots.allocate(count) for count in (1, 2, 2, 1)]
    for group in (groups[0], groups[2]):
        assert group is not None
        slots.release(group)
    np.testing.assert_array_equal(slots.allocate(2), [3, 4])  # type: ignore[arg-type]


def test_more_than_is_free_is_refused_and_takes_nothing() -> None:
    slots = SlotAllocator(4)
    assert slots.allocate(3) is not None
    assert slots.allocate(2) is None
    assert slots.free == 1


def test_no_slot_belongs_to_two_groups() -> None:
    rng = np.random.default_rng(0)
    slots = SlotAllocator(64)
    held: list[np.ndarray] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            slots.release(held.pop(int(rng.integers(len(held)))))
        got = slots.allocate(int(rng.integers(1, 17)))
        if got is not None:
            held.append(got)
        used = np.concatenate(held) if held else np.empty(0)
        assert len(np.unique(used)) == len(used) == slots.capacity - slots.free


def test_slots_are_released_once() -> None:
    slots = SlotAllocator(2)
    got = slots.allocate(1)
    assert got is not None
    slots.release(got)
    with pytest.raises(AssertionError):
        slots.release(got)
