"""Counters that are made of figures."""

from prometheus_client.metrics_core import Metric

from shared.families import Families


def values(family: Metric) -> list[float]:
    return [sample.value for sample in family.samples]


def test_a_counter_never_falls_and_a_gauge_does() -> None:
    families = Families("p")
    assert [values(families.counter("steps", "Steps.", value)) for value in (5, 3, 6)] == [[5], [5], [6]]
    assert [values(families.gauge("size", "Size.", value)) for value in (5, 3, 6)] == [[5], [3], [6]]


def test_each_label_has_a_counter_of_its_own() -> None:
    families = Families("p")
    for count in ({"a": 2, "b": 1}, {"a": 1, "b": 7}):
        family = families.counters("chunks", "Chunks.", label="outcome", values=count)
    assert [(sample.name, sample.labels, sample.value) for sample in family.samples] == [
        ("p_chunks_total", {"outcome": "a"}, 2),
        ("p_chunks_total", {"outcome": "b"}, 7),
    ]
