import subprocess
import sys
from typing import Any

import orjson

from tests.support.commands import ROOT, environment


def test_the_replay_is_filled_and_sampled_also_while_a_snapshot_is_written() -> None:
    words = ("--sequences", "1500", "--distinct", "20", "--environments", "4", "--snapshot")
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/replay_memory.py"), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = orjson.loads(result.stdout)
    assert (figures["sequences"], figures["distinct_sequences"], figures["lstm_size"]) == (1500, 24, 512)
    assert 2 * 1500 <= figures["rows"] < 3 * 1500
    # 512 floats each of h and c do not compress.
    assert figures["bytes_per_step"] > 2 * 512 * 4 / 40
    # Rows that were shared instead of stored again would take no memory.
    assert figures["resident_bytes_per_step"] > 0.5 * figures["bytes_per_step"]
    assert figures["snapshot_gb"] > figures["table_gb"]
    assert 0 < figures["median_sample_seconds"] <= figures["slowest_sample_seconds"]
