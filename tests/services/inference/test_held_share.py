from services.inference.held_share import HeldShare


def test_being_held_back_is_averaged_over_all() -> None:
    now = 100.0
    held = HeldShare(lambda: now)
    held.change(members=4)
    now += 1.0
    held.change(held=2)
    now += 3.0
    assert held.seconds() == 1.5
    held.change(members=-2)
    now += 1.0
    assert held.seconds() == 2.5
    held.change(held=-2)
    now += 9.0
    assert held.seconds() == 2.5
