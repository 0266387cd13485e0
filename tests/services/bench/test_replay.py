import subprocess
from pathlib import Path

import orjson

from tests.support.commands import command, environment, one_clear_line

SMALL = (
    *("--group-size", "4", "--unroll", "10", "--burn-in", "10", "--sequence-length", "10"),
    *("--lstm-size", "16", "--replay-capacity", "200", "--batch-size", "8"),
    *("--windows", "2", "--window-seconds", "0.3"),
)


def bench(*words: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    settings = environment(TMPDIR=str(temporary))
    return subprocess.run(
        command("bench", "replay", *words), env=settings, capture_output=True, text=True, timeout=120
    )


def test_figures_of_the_service_and_of_the_table_alone_are_told(tmp_path: Path) -> None:
    said = bench(*SMALL, "--json", temporary=tmp_path)
    assert said.returncode == 0, said.stderr
    figures = orjson.loads(said.stdout)
    assert (figures["env"], figures["batch_size"], figures["windows"]) == ("ALE/Pong-v5", 8, 2)
    for what in ("inserts", "samples", "updates"):
        assert figures[f"{what}_per_second"] > 0
        assert figures[f"core_{what}_per_second"] > 0
    assert 20 < figures["bytes_per_step"] < 7056, "frames are compressed"
    assert 100 <= figures["sequences"] <= 200
    assert not list(tmp_path.glob("seedrl-bench-*"))


def test_an_environment_that_does_not_exist_is_named_in_one_line(tmp_path: Path) -> None:
    said = bench("--env", "ALE/Pang-v5", temporary=tmp_path)
    assert "Pang" in one_clear_line(said)
