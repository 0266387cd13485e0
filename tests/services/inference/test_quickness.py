import pytest

from services.inference.quickness import Quickness


def quick(quickness: Quickness) -> None:
    quickness.took(seconds=0.0015, cpu_seconds=0.0002)  # it waited for the interpreter


def test_it_takes_many_quick_batches_and_slow_ones_outweigh_them() -> None:
    quickness = Quickness()
    for _ in range(32):
        assert not quickness.is_quick
        quick(quickness)
    assert quickness.is_quick
    for _ in range(32):
        assert quickness.is_quick, "single ones may be slow by chance"
        quickness.took(seconds=0.001, cpu_seconds=0.001)
    assert not quickness.is_quick
    quick(quickness)
    assert not quickness.is_quick


def test_a_long_batch_ends_it_at_once() -> None:
    quickness = Quickness()
    for _ in range(32):
        quick(quickness)
    quickness.took(seconds=0.07, cpu_seconds=0.07)
    assert not quickness.is_quick


@pytest.mark.parametrize(
    ("between", "seconds", "cpu_seconds"),
    [
        pytest.param(4, 0.01, 0.01, id="long ones among quick ones"),
        pytest.param(0, 0.004, 0.0, id="waiting without computing"),
    ],
)
def test_what_holds_up_too_often_is_not_quick(between: int, seconds: float, cpu_seconds: float) -> None:
    quickness = Quickness()
    for _ in range(100):
        for _ in range(between):
            quick(quickness)
        quickness.took(seconds=seconds, cpu_seconds=cpu_seconds)
        assert not quickness.is_quick
