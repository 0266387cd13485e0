import pytest
import torch

from shared.networks.leaves import FlatLeaves, one_hot, pixels, scale
from shared.networks.pictures import Picture, is_image, picture
from shared.specs import LeafSpec


def leaf(*shape: int, dtype: str = "uint8", high: float = 255.0, n: int = 0, name: str = "x") -> LeafSpec:
    return LeafSpec(name=name, dtype=dtype, shape=shape, low=(0.0,), high=(high,), n=n)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((84, 84), "uint8", True),
        ((84, 84, 3), "uint8", True),
        ((4, 72, 96), "float32", True),
        ((10, 10, 4), "bool", True),
        ((84, 84), "int64", False),
        ((128,), "uint8", False),
        ((2, 3, 4, 5), "uint8", False),
        ((), "float32", False),
    ],
)
def test_an_image_is_uint8_bool_or_floats_with_two_or_three_axes(
    shape: tuple[int, ...], dtype: str, expected: bool
) -> None:
    assert is_image(leaf(*shape, dtype=dtype)) is expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((72, 96), Picture(1, 72, 96)),
        ((72, 96, 3), Picture(3, 72, 96)),
        ((3, 72, 96), Picture(3, 72, 96)),
        ((1, 84, 84), Picture(1, 84, 84)),
        ((84, 84, 1), Picture(1, 84, 84)),
        ((3, 84, 3), Picture(3, 3, 84)),  # both could be: the last axis
        ((10, 10, 7), Picture(7, 10, 10)),  # neither: the last axis
    ],
)
def test_the_channel_axis_is_told_by_its_size(shape: tuple[int, ...], expected: Picture) -> None:
    assert picture(leaf(*shape)) == expected


@pytest.mark.parametrize("stack", [1, 2])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6), (5, 6, 7)])
def test_pixels_keep_their_place_and_stacked_frames_become_channels(
    shape: tuple[int, ...], stack: int
) -> None:
    spec = leaf(*shape)
    channels, height, width = picture(spec)
    frames = torch.randint(0, 255, (2, stack, *shape), dtype=torch.uint8)
    arranged = pixels(spec, frames if stack > 1 else frames[:, 0])
    assert arranged.shape == (2, stack * channels, height, width)
    assert arranged.dtype == torch.uint8
    for s in range(stack):
        for c in range(channels):
            frame = frames[1, s]
            expected = frame if len(shape) == 2 else frame[c] if shape == (3, 5, 6) else frame[:, :, c]
            assert torch.equal(arranged[1, s * channels + c], expected)


def test_uint8_is_scaled_by_its_bound_and_other_numbers_are_not() -> None:
    assert scale(leaf(4, 4)) == 1 / 255
    assert scale(leaf(4, high=1.0)) == 1
    assert scale(leaf(4, high=0.0)) == 1
    assert scale(leaf(4, 4, dtype="float32")) == 1
    assert scale(leaf(4, dtype="int64", high=9.0)) == 1


@pytest.mark.parametrize("stack", [1, 2])
def test_leaves_are_flattened_in_order_with_discrete_ones_one_hot(stack: int) -> None:
    specs = [leaf(2, dtype="int16", name="a"), leaf(dtype="int64", n=3, name="b"), leaf(3, name="c")]
    flat = FlatLeaves(specs, stack)
    values = {
        "c": torch.tensor([[[0, 51, 255], [255, 0, 0]]], dtype=torch.uint8),
        "b": torch.tensor([[2, 0]]),
        "a": torch.tensor([[[-7, 9], [1, 2]]], dtype=torch.int16),
    }
    expected = [-7, 9, 1, 2, 0, 0, 1, 1, 0, 0, 0, 0.2, 1, 1, 0, 0]
    if stack == 1:
        values = {name: value[:, 0] for name, value in values.items()}
        expected = [-7, 9, 0, 0, 1, 0, 0.2, 1]
    result = flat(values)
    torch.testing.assert_close(result, torch.tensor([expected], dtype=torch.float32))
    assert result.shape == (1, flat.size)


def test_a_flat_uint8_image_is_normalized_without_losing_its_brightness() -> None:
    flat = FlatLeaves([leaf(2, 2)], 1)
    dark, bright = flat(
        {"x": torch.tensor([[[0, 10], [10, 0]], [[200, 200], [200, 200]]], dtype=torch.uint8)}
    )
    assert flat.size == 6
    assert dark[:4].abs().min() > 0.9
    torch.testing.assert_close(bright[:4], torch.zeros(4))
    torch.testing.assert_close(bright[4:], torch.tensor([200 / 255, 0.0]))


def test_one_hot_marks_the_value_and_nothing_out_of_range() -> None:
    assert one_hot(torch.tensor([[1], [0]]), 2).tolist() == [[[0, 1]], [[1, 0]]]
    assert one_hot(torch.tensor([5]), 2).tolist() == [[0, 0]]
