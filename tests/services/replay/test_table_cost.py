import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.replay.table import Table

STEPS = 4
ROWS = 50


def filled(size: int) -> Table:
    def first(td_errors: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.floating]:
        return td_errors[:, 0]

    table = Table(
        capacity=size,
        max_bytes=0,
        priority_exponent=0.9,
        chunks_per_item=6,
        chunk_stride=1,
        chunk_steps=STEPS,
        priorities=first,
        seed=1,
    )
    rng = np.random.default_rng(0)
    number = 0
    while table.size < size:
        errors = rng.uniform(0.1, 5.0, (ROWS, STEPS))
        rows = [b"%d %d" % (number, row) for row in range(ROWS)]
        table.insert(
            "a", 0, number, rows=rows, td_errors=errors, valid=np.ones((ROWS, STEPS), np.bool_), now=0.0
        )
        number += 1
    return table


def cpu_seconds(call: Callable[[], Any], *, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return time.process_time() - start


def least_seconds(tables: tuple[Table, Table]) -> tuple[float, float]:
    """Least CPU seconds of sampling each, in turns: what nothing else on the machine slowed."""
    costs = [[cpu_seconds(lambda t=t: t.sample(64, now=0.0), calls=20) for t in tables] for _ in range(25)]
    small, large = np.array(costs).min(axis=0)
    return small, large


def test_neither_samples_nor_states_cost_in_proportion_to_the_items() -> None:
    tables = filled(1000), filled(30_000)
    small, large = least_seconds(tables)
    assert large < 3 * small
    assert tables[1].rows > 30_000
    assert min(cpu_seconds(tables[1].state, calls=1) for _ in range(5)) < 0.1


@pytest.mark.slow  # quick, but where others empty the caches the larger table pays more for it
def test_sampling_costs_at_most_half_more_of_100000_items_than_of_1000() -> None:
    small, large = least_seconds((filled(1000), filled(100_000)))
    assert large <= 1.5 * small
