import threading

import pytest
from prometheus_client import CollectorRegistry

from shared.activity import Activity, Spent, SpentCounter


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


def test_what_goes_on_counts_while_it_does_and_for_each_that_is_at_it() -> None:
    clock = Clock()
    spent = Spent(clock)
    clock.now += 5.0
    with spent:
        clock.now += 1.0
        assert spent.seconds() == 1.0
        with spent:
            clock.now += 2.0
            assert spent.seconds() == 5.0
        clock.now += 1.0
    clock.now += 7.0
    assert spent.seconds() == 6.0
    with pytest.raises(ZeroDivisionError), spent:
        _ = 1 // 0
    clock.now += 1.0
    assert spent.seconds() == 6.0


def test_a_freeze_in_a_long_work_is_work_then_and_afterwards() -> None:
    clock = Clock()
    spent = Spent(clock)
    activity = Activity("x", spent.seconds, clock=clock)
    with spent:
        clock.now += 20.0
        activity.sample()
        assert activity.shares() == {"work": 1.0, "input": 0.0, "output": 0.0}
    for _ in range(20):
        clock.now += 1.0
        activity.sample()
    assert activity.shares() == {"work": 0.0, "input": 1.0, "output": 0.0}
    assert activity.totals() == (20.0, 20.0, 0.0)


def test_what_several_threads_spend_never_falls() -> None:
    spent, go_on = Spent(), threading.Event()

    def work() -> None:
        while not go_on.is_set():
            with spent:
                pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen = [spent.seconds() for _ in range(5000)]
    go_on.set()
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert spent.seconds() == spent.seconds(), "nobody is within it any more"


def test_its_counter_says_the_same() -> None:
    registry = CollectorRegistry()
    counter = SpentCounter("seedrl_x_wait_seconds_total", "Waits.", registry)

    def said() -> float:
        value = registry.get_sample_value("seedrl_x_wait_seconds_total")
        assert value is not None
        return value

    assert said() == 0.0
    with counter:
        first = said()
        assert 0.0 < first < said()
    assert said() == counter.seconds() > first
