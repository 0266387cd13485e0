from services.inference.quickness import Quickness

QUICK, SLOW = 0.0001, 0.01


def test_it_takes_many_quick_ones_and_slow_ones_outweigh_them() -> None:
    quickness = Quickness()
    assert not quickness.is_quick
    for _ in range(31):
        quickness.took(QUICK)
    assert not quickness.is_quick
    quickness.took(QUICK)
    assert quickness.is_quick
    quickness.took(SLOW)
    assert quickness.is_quick, "one slow one may have waited for the interpreter"
    for _ in range(15):
        quickness.took(SLOW)
    assert not quickness.is_quick
    quickness.took(QUICK)
    assert not quickness.is_quick


def test_half_of_them_slow_is_too_many() -> None:
    quickness = Quickness()
    for _ in range(1000):
        quickness.took(QUICK)
        quickness.took(SLOW)
        assert not quickness.is_quick
