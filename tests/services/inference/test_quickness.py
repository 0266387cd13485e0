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


def test_long_batches_among_quick_ones_are_too_many() -> None:
    quickness = Quickness()
    for _ in range(100):
        for _ in range(4):
            quick(quickness)
        quickness.took(seconds=0.01, cpu_seconds=0.01)
        assert not quickness.is_quick


def test_what_waits_without_computing_is_not_quick() -> None:
    quickness = Quickness()
    for _ in range(100):
        quickness.took(seconds=0.004, cpu_seconds=0.0)
        assert not quickness.is_quick
