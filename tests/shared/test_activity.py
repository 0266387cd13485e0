import pytest

from shared.activity import Activity, HeldShare, Processor


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_neither_work_nor_output_is_waiting_for_input() -> None:
    clock, spent = Clock(), {"work": 0.0, "output": 0.0}
    activity = Activity("x", lambda: spent["work"], lambda: spent["output"], clock=clock)
    assert activity.shares() == {"work": 0.0, "input": 0.0, "output": 0.0}
    for _ in range(40):
        clock.now += 1.0
        spent["work"] += 0.5
        spent["output"] += 0.25
        activity.sample()
    assert activity.shares() == {"work": 0.5, "input": 0.25, "output": 0.25}
    assert sum(activity.totals()) == pytest.approx(40.0)
    for _ in range(12):  # the last ten seconds count
        clock.now += 1.0
        activity.sample()
    assert activity.shares() == {"work": 0.0, "input": 1.0, "output": 0.0}


def test_counters_never_fall_when_long_work_ends() -> None:
    clock, spent = Clock(), [0.0]
    activity = Activity("x", lambda: spent[0], clock=clock)
    clock.now += 5.0
    assert activity.totals() == (0.0, 5.0, 0.0)
    spent[0] = 5.0
    assert activity.totals() == (5.0, 5.0, 0.0)
    (family,) = activity.collect()
    assert {sample.labels["activity"]: sample.value for sample in family.samples} == {
        "work": 5.0,
        "input": 5.0,
        "output": 0.0,
    }


def test_being_held_back_is_averaged_over_all() -> None:
    clock = Clock()
    held = HeldShare(clock)
    held.change(members=4)
    clock.now += 1.0
    held.change(held=2)
    clock.now += 3.0
    assert held.seconds() == 1.5
    held.change(members=-2)
    clock.now += 1.0
    assert held.seconds() == 2.5
    held.change(held=-2)
    clock.now += 9.0
    assert held.seconds() == 2.5


def test_the_processors_share_is_one() -> None:
    processor = Processor()
    sum(range(3_000_000))
    processor.sample()
    assert processor.busy is None or 0.0 <= processor.busy <= 1.0
