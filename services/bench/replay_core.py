"""What replay's table does alone, in one process and without a message."""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from services.bench.replay_config import ReplayBenchConfig
from services.replay.config import ReplayConfig
from services.replay.shelf import Shelf
from shared.wire.chunk_rows import split_message


class CoreFigures(NamedTuple):
    """Medians over the windows."""

    inserts_per_second: float  # sequences completed
    samples_per_second: float  # sequences
    updates_per_second: float  # priorities
    bytes_per_step: float


def core_figures(config: ReplayBenchConfig, replay: ReplayConfig, messages: list[bytes]) -> CoreFigures:
    """Inserts, samples and updates of a table as the service has it. Blocks for some seconds."""
    shelf = Shelf(replay, seed=0)
    speeds = [_inserted(shelf, config, messages, window) for window in range(config.windows + 1)][1:]
    rng = np.random.default_rng(0)
    keys = shelf.table.sample(config.batch_size, now=0.0).keys

    def sample() -> None:
        nonlocal keys
        keys = shelf.sample(config.batch_size, now=0.0).keys

    def update() -> None:
        shelf.update(keys, rng.random(config.batch_size))

    return CoreFigures(
        median(speeds),
        _calls_per_second(sample, config) * config.batch_size,
        _calls_per_second(update, config) * config.batch_size,
        shelf.table.total_bytes / (shelf.table.rows * config.unroll),
    )


def _inserted(shelf: Shelf, config: ReplayBenchConfig, messages: list[bytes], window: int) -> float:
    """Sequences a second; taking messages apart is not part of it."""
    items = 0
    seconds = 0.0
    for stream in range(config.streams):
        for message in messages:
            rows = split_message(message)
            rows = rows._replace(header=replace(rows.header, stream_id=f"{window}-{stream}"))
            began = time.perf_counter()
            items += shelf.insert(rows, now=float(window)).items
            seconds += time.perf_counter() - began
    return items / seconds


def _calls_per_second(call: Callable[[], None], config: ReplayBenchConfig) -> float:
    speeds = []
    for _ in range(config.windows):
        calls, began = 0, time.perf_counter()
        while time.perf_counter() < began + config.window_seconds:
            call()
            calls += 1
        speeds.append(calls / (time.perf_counter() - began))
    return median(speeds)
