import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peer_comparison.conditions import conditions
from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Measured, Reading, Window, ratio, sample_factory_readings
from benchmarks.peer_comparison.measuring import Timing
from benchmarks.peer_comparison.sample_factory import install
from benchmarks.peer_comparison.section import BEGIN, END, comparison, document_with, write_between_markers
from benchmarks.peer_comparison.seedrl import Seedrl
from tests.support.commands import ROOT, environment
from tests.support.local_run import training

LOG = """\
[2026-01-31 23:59:58,750][00076] Fps is (10 sec: 0.0, 60 sec: nan). Total num frames: 0. Throughput: 0: 27.2.
[2026-01-31 23:59:59,000][00076] Avg episode reward: [(0, '-19.667')]
\x1b[36m[2026-02-01 00:00:03,750][00076] Fps is (10 sec: 256.1). Total num frames: 5120. Samples: 1.\x1b[0m
[2026-02-01 00:00:08,751][00076] Fps is (10 sec: 256.1, 60 sec: 2"""


def peers(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/peers.py"), *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def one_line(text: str) -> str:
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if "peers" in line and not line.startswith("usage")]
    assert len(lines) == 1, text
    return lines[0]


def test_reports_of_sample_factory_become_steps_on_a_clock_in_seconds() -> None:
    first, last = sample_factory_readings(LOG, batch_steps=640)
    assert (first.steps, last.steps) == (0, 1280)  # 5120 emulator frames
    assert last.seconds - first.seconds == pytest.approx(5.0)
    assert Window(first, last).steps_per_second == pytest.approx(256.0)


def test_frames_that_are_no_whole_batches_are_not_taken_for_steps() -> None:
    with pytest.raises(ComparisonError, match="5120 frames, no multiple of 700 × 4"):
        sample_factory_readings(LOG, batch_steps=700)


def test_steps_in_refused_chunks_do_not_count() -> None:
    first = Reading(10.0, 1_000, chunks=10, refused_chunks=5)
    last = Reading(20.0, 2_000, chunks=20, refused_chunks=7)
    assert Window(first, last).steps_per_second == pytest.approx(80.0)  # two of ten chunks were refused


def test_the_ratio_is_that_of_the_medians_and_of_each_round() -> None:
    times = ratio(Measured("a", "", (300.0, 900.0, 400.0)), Measured("b", "", (100.0, 150.0, 200.0)))
    assert times.of_medians == pytest.approx(400 / 150)
    assert times.by_round == pytest.approx((3.0, 6.0, 2.0))


def test_the_table_has_every_figure_and_the_ratio_to_the_last() -> None:
    ours, theirs = Measured("ours", "0.1.0", (1900.0, 2100.0)), Measured("theirs", "2.1.1", (500.0, 500.0))
    text = comparison([ours, theirs], conditions="on a machine")
    assert "| ours | 2,000 | 1,900, 2,100 | 0.1.0 |" in text
    assert "| theirs | 500 | 500, 500 | 2.1.1 |" in text
    assert "ours ÷ theirs: **4.00** (by round: 3.80, 4.20)" in text
    assert text.endswith("on a machine")


def test_the_section_shows_the_whole_command_of_either() -> None:
    text = conditions(rounds=2, timing=Timing(30.0, 60.0), load_before=0.1, extra_flags=["--seed=1"])
    assert re.search(r"--rollout=20 .*--batch_size=640[^`]* --seed=1\n```", text, re.DOTALL)
    assert "2 groups of 128 environments" in text
    assert re.search(
        r"\nseedrl train ALE/Pong-v5 --preset=atari_vtrace [^`]*--batch-size=32 [^`]*\n```", text
    )
    assert "2 rounds" in text
    assert "a window of 60 s" in text


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(path, "new\n")
    write_between_markers(path, "newer")
    assert path.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"


def test_a_missing_document_is_made_with_a_title(tmp_path: Path) -> None:
    write_between_markers(tmp_path / "performance.md", "table")
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith("# Performance\n")
    assert f"{BEGIN}\ntable\n{END}\n" in text


@pytest.mark.parametrize(
    "document",
    ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}", f"{BEGIN}\n{BEGIN}\n{END}"],
)
def test_a_document_without_one_pair_of_markers_is_refused(tmp_path: Path, document: str) -> None:
    path = tmp_path / "performance.md"
    path.write_text(document)
    with pytest.raises(ComparisonError, match="must hold one line"):
        document_with(path, "table")


def test_a_directory_that_is_something_else_does_not_become_the_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ComparisonError, match="is no virtual environment"):
        install(tmp_path)


def test_the_learners_counters_are_read_from_a_real_run(tmp_path: Path) -> None:
    contestant = Seedrl("float32")
    words = ("CartPole-v1", "--preset", "cartpole", "--total-steps", "10000000")
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until(lambda: (reading := contestant.reading(tmp_path)) is not None and reading.steps > 0)
        reading = contestant.reading(tmp_path)
        assert reading is not None
        assert reading.chunks > reading.refused_chunks >= 0
        run.until_steps(reading.steps)  # the journal counts the same
        run.end()


STARTS_A_FAMILY = """
import os, subprocess, sys
from pathlib import Path
from benchmarks.peer_comparison.processes import adopt_orphans, running
sleeper = '''
import subprocess, time
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
time.sleep(600)
'''
adopt_orphans()
mine = subprocess.Popen(["sleep", "600"])
directory = Path(sys.argv[1])
family = [sys.executable, "-c", sleeper]
with running("family", family, environment=os.environ, directory=directory) as system:
    while not system.last_words().isdecimal():
        system.pause(0.05)
    print(system.last_words())
print(mine.poll())
mine.kill()
"""


@pytest.mark.slow
def test_nothing_that_a_system_started_is_left_and_nothing_else_is_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS_A_FAMILY, tmp_path],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    orphan, bystander = done.stdout.split()
    assert bystander == "None"
    with pytest.raises(ProcessLookupError):
        os.kill(int(orphan), 0)


def test_a_system_that_ends_by_itself_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from benchmarks.peer_comparison.processes import running\n"
        "words = [sys.executable, '-c', 'print(1); print(\"out of luck\"); raise SystemExit(3)']\n"
        "with running('it', words, environment=os.environ, directory=Path(sys.argv[1])) as system:\n"
        "    system.pause(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert "ComparisonError: it ended with status 3: out of luck" in done.stderr


def test_its_help_teaches_what_is_compared_and_shows_examples() -> None:
    done = peers("--help")
    assert done.returncode == 0
    for words in ("Sample Factory", "environment steps per second", "--rounds", "examples:", "--print-only"):
        assert words in done.stdout


@pytest.mark.parametrize(
    "words", [("--rounds", "0"), ("--seconds", "-1"), ("--seconds", "nan"), ("--round", "1")]
)
def test_a_wrong_option_is_refused_in_one_line(words: tuple[str, ...]) -> None:
    done = peers(*words)
    assert done.returncode == 2
    assert words[0] in one_line(done.stderr)


def test_a_document_that_cannot_take_the_table_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n")
    done = peers("--document", tmp_path / "notes.md", "--venv", tmp_path / "venv")
    assert done.returncode == 1
    assert "notes.md must hold one line" in one_line(done.stderr)
    assert not (tmp_path / "venv").exists()
