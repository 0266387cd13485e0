import time
from collections.abc import Callable
from typing import Any

import numpy as np
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


def test_sampling_costs_about_the_same_of_100000_items_as_of_1000_and_a_state_little() -> None:
    small, large = filled(1000), filled(100_000)
    costs = [
        [cpu_seconds(lambda t=table: t.sample(64, now=0.0), calls=20) for table in (small, large)]
        for _ in range(25)  # in turns; the least of each is what nothing else on the machine slowed
    ]
    least_small, least_large = np.array(costs).min(axis=0)
    assert least_large <= 1.5 * least_small
    assert large.rows > 100_000
    assert min(cpu_seconds(large.state, calls=1) for _ in range(5)) < 0.25
