"""What a full replay takes of memory and what a sample of it costs, with recorded sequences.

Chunks of an environment that is played at random, with random recurrent states and TD errors, are inserted
over and over as the service inserts them: each time taken apart anew, so that no two sequences share their
bytes. With --snapshot, a snapshot is written beside the samples, as the service writes it.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from services.actor.environments import GroupMaker
from services.bench.replay_chunks import recorded
from services.bench.replay_config import ReplayBenchConfig
from services.cli import known_settings
from services.replay.config import ReplayConfig
from services.replay.shelf import Shelf
from services.replay.snapshots import Snapshot, Snapshots
from shared.config import load
from shared.memory import keep_freed_memory
from shared.wire.chunk_rows import split_message
from shared.wire.replay import SampleAnswer, encode_sample

GROUPS = 2
SMALL = 1000
CALLS = 400
RUN_ID = "memory"


def resident_gb() -> float:
    """Of this process, in 10⁹ bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e9


def settings(env: str, preset: str, distinct: int, environments: int) -> ReplayBenchConfig:
    """So many sequences of each environment that there are at least `distinct` in all groups."""
    each = -(-distinct // (GROUPS * environments))
    words = [f"--env={env}", f"--environments={environments}", f"--recorded-sequences={each}"]
    return load(ReplayBenchConfig, words, prog="replay_memory", known=known_settings(), preset_name=preset)


def record(config: ReplayBenchConfig) -> list[list[bytes]]:
    """The messages of each group; in processes of their own, whose memory does not count here."""
    maker = GroupMaker(env=config.env, group_size=config.environments, env_kwargs=config.env_kwargs)
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(GROUPS, mp_context=spawned) as processes:
        futures = [
            processes.submit(recorded, maker, config, run_id=RUN_ID, chunks=config.chunks, seed=seed)
            for seed in range(GROUPS)
        ]
        return [future.result().messages for future in futures]


def passes(groups: list[list[bytes]]) -> Iterator[tuple[str, bytes]]:
    """Every group's messages, and then again as another stream's; for ever."""
    number = 0
    while True:
        for group, messages in enumerate(groups):
            for message in messages:
                yield f"{number}-{group}", message
        number += 1


def fill(shelf: Shelf, groups: list[list[bytes]], items: int) -> None:
    """Inserts until there were `items` sequences."""
    for stream_id, message in passes(groups):
        rows = split_message(message)
        header = replace(rows.header, stream_id=stream_id)
        shelf.insert(rows._replace(header=header), now=time.time())
        if shelf.table.inserts >= items:
            return


def shelf_of(config: ReplayBenchConfig, capacity: int) -> Shelf:
    """As the service has it."""
    replay = config.replay(run_id=RUN_ID, run_dir=Path())
    return Shelf(ReplayConfig.model_validate({**dict(replay), "replay_capacity": capacity}), seed=0)


def draw(shelf: Shelf, batch_size: int) -> SampleAnswer:
    """What the service's table gives."""
    drawn = shelf.sample(batch_size, now=time.time())
    return SampleAnswer(drawn.keys, drawn.probabilities, drawn.size, drawn.rows)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sampling(large: Shelf, small: Shelf, batch_size: int) -> dict[str, Any]:
    """Median seconds of a sample of either, in turns, so that what else runs weighs on both alike."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(CALLS):
        for name, shelf in (("small", small), ("large", large)):
            lists = seconds.setdefault(name, {"draw": [], "answer": []})
            began = time.perf_counter()
            answer = draw(shelf, batch_size)
            lists["draw"].append(time.perf_counter() - began)
            encode_sample(answer)
            lists["answer"].append(time.perf_counter() - began)
    figures: dict[str, Any] = {}
    for part in ("draw", "answer"):
        at_small, at_large = median(seconds["small"][part]), median(seconds["large"][part])
        figures[f"{part}_seconds_at_{small.table.size}"] = at_small
        figures[f"{part}_seconds_at_{large.table.size}"] = at_large
        figures[f"{part}_ratio"] = at_large / at_small
    return figures


def during_snapshot(shelf: Shelf, batch_size: int) -> dict[str, Any]:
    """Samples while a snapshot is written in a thread; the first one waits for the copy of the indexes."""
    with (
        tempfile.TemporaryDirectory(prefix="seedrl-memory-") as directory,
        ThreadPoolExecutor(1) as thread,
    ):
        snapshots = Snapshots(Path(directory), keep=2)
        figures = slowest_sample(shelf, batch_size, snapshots, thread)
        size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    return {"snapshot_gb": size / 1e9, **figures}


def slowest_sample(shelf: Shelf, batch_size: int, snapshots: Snapshots, thread: Executor) -> dict[str, Any]:
    """While one snapshot is written."""
    began = time.perf_counter()
    state = shelf.state()
    copied = time.perf_counter() - began
    writing: Future[Path] = thread.submit(snapshots.save, "full", Snapshot(state, {}))
    samples = [copied + timed(lambda: encode_sample(draw(shelf, batch_size)))]
    while not writing.done():
        samples.append(timed(lambda: encode_sample(draw(shelf, batch_size))))
    writing.result()
    return {
        "snapshot_seconds": time.perf_counter() - began,
        "snapshot_copy_seconds": copied,
        "samples_meanwhile": len(samples),
        "median_sample_seconds": median(samples),
        "slowest_sample_seconds": max(samples),
    }


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--preset", default="atari_r2d2")
    parser.add_argument("--sequences", type=int, default=100_000, help="that the replay holds")
    parser.add_argument("--distinct", type=int, default=2000, help="that are recorded")
    parser.add_argument("--environments", type=int, default=32, help="of each of the two groups")
    parser.add_argument("--snapshot", action="store_true", help="write one beside samples, too")
    return parser.parse_args()


def main() -> None:
    """Records, fills, measures, prints JSON."""
    keep_freed_memory()  # as every service
    given = arguments()
    config = settings(given.env, given.preset, given.distinct, given.environments)
    groups = record(config)
    before = resident_gb()
    shelf = shelf_of(config, given.sequences)
    filling = timed(lambda: fill(shelf, groups, given.sequences))
    after, table = resident_gb(), shelf.table
    small = shelf_of(config, SMALL)
    fill(small, groups, SMALL)
    figures = {
        "env": given.env,
        "sequences": table.size,
        "distinct_sequences": config.recorded_sequences * config.environments * GROUPS,
        "rows": table.rows,
        "steps_per_row": config.unroll,
        "lstm_size": config.lstm_size,
        "resident_gb_before": before,
        "resident_gb_after": after,
        "table_gb": table.total_bytes / 1e9,
        "bytes_per_step": table.total_bytes / (table.rows * config.unroll),
        "resident_bytes_per_step": (after - before) * 1e9 / (table.rows * config.unroll),
        "fill_seconds": filling,
        "batch_size": config.batch_size,
        **sampling(shelf, small, config.batch_size),
    }
    if given.snapshot:
        figures |= during_snapshot(shelf, config.batch_size)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
