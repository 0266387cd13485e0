"""What a full replay of Atari costs: memory, and how long a sample takes then, also during a snapshot.

python benchmarks/replay_memory.py --env ALE/Pong-v5 --sequences 100000 --distinct 2000

Sequences of 80 steps after a burn-in of 40, from chunks of 40 steps with recurrent states of LSTM 512,
recorded at random play; each is stored as a copy of its own. Prints one line of JSON.
"""

import argparse
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import orjson

from services.bench.replay_chunks import RUN_ID, Recorder
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_measuring import replay_settings
from services.replay.config import ReplayConfig
from services.replay.shelf import Shelf
from services.replay.snapshots import Snapshot, Snapshots
from shared.wire.chunk_rows import Rows, split_message
from shared.wire.chunks import encode_chunk

ENVIRONMENTS = 64
BATCH = 64
FEW = 1000  # sequences, of the table that the full one is compared with


def main() -> None:
    """Fills a table and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=2000)
    words = parser.parse_args()
    sizes = {"burn_in": 40, "sequence_length": 80, "replay_capacity": words.sequences}
    config = ReplayBenchConfig.model_validate({"env": words.env, **sizes})
    settings = ReplayConfig.model_validate({"run_id": RUN_ID, **replay_settings(config)})
    recorded = _recorded(config, settings, words.distinct)
    shelf, before = Shelf(settings, seed=0), _resident_bytes()
    copies = _copies(recorded)
    few = _filled(shelf, copies, FEW)
    many = _filled(shelf, copies, words.sequences)
    resident = _resident_bytes() - before
    stored = shelf.table.rows * config.unroll
    print(
        orjson.dumps(
            {
                "env": words.env,
                "sequences": shelf.table.size,
                "distinct": sum(len(rows.records) for rows in recorded) // 2,
                "resident_gigabytes": resident / 1e9,
                "stored_gigabytes": shelf.table.total_bytes / 1e9,
                "bytes_per_step": shelf.table.total_bytes / stored,
                f"sample_seconds_at_{FEW}": few,
                f"sample_seconds_at_{words.sequences}": many,
                "ratio": many / few,
                **_during_a_snapshot(shelf),
            }
        ).decode()
    )


def _recorded(config: ReplayBenchConfig, settings: ReplayConfig, distinct: int) -> list[Rows]:
    """The messages of one stream; two chunks more of each row make one sequence more."""
    recorder = Recorder(config.env, ENVIRONMENTS, settings)
    try:
        count = 1 + 2 * -(-distinct // ENVIRONMENTS)
        chunks = itertools.islice(recorder.chunks(), count)
        return [split_message(encode_chunk(chunk)) for chunk in chunks]
    finally:
        recorder.close()


def _copies(recorded: list[Rows]) -> Iterator[Rows]:
    """The messages again and again, each time as another stream's, all bytes copied."""
    for number in itertools.count():
        for rows in recorded:
            records = [bytes(bytearray(record)) for record in rows.records]
            header = replace(rows.header, stream_id=f"stream-{number}")
            yield rows._replace(header=header, records=records)


def _filled(shelf: Shelf, copies: Iterator[Rows], items: int) -> float:
    """Inserts until there are so many items; the seconds of a sample then."""
    while shelf.table.size < items:
        shelf.insert(next(copies), now=time.time())
    return median(_sample_seconds(shelf) for _ in range(2000))


def _sample_seconds(shelf: Shelf) -> float:
    began = time.perf_counter()
    shelf.sample(BATCH, now=time.time())
    return time.perf_counter() - began


def _during_a_snapshot(shelf: Shelf) -> dict[str, float]:
    """The longest sample while all is written; as in the service, this thread copies the indexes first."""
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-") as directory:
        began = time.perf_counter()
        snapshot = Snapshot(shelf.state(), {})
        copying = time.perf_counter() - began
        writer = threading.Thread(
            target=Snapshots(Path(directory), keep=1).save, args=("bench", snapshot), name="writer"
        )
        writer.start()
        longest = 0.0
        while writer.is_alive():
            longest = max(longest, _sample_seconds(shelf))
            time.sleep(0.001)  # as often as a fast learner asks
        return {
            "snapshot_seconds": time.perf_counter() - began,
            "snapshot_copying_seconds": copying,
            "longest_sample_seconds_during_it": longest,
        }


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


if __name__ == "__main__":
    main()
