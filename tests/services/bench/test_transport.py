import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from services.bench.transport_frames import record, recorded_steps
from services.bench.transport_network import FreeNetwork
from shared.networks.contract import check_network
from shared.networks.precision import resolve_device
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec
from tests.support.commands import command, environment, one_clear_line
from tests.support.processes import children, is_running
from tests.support.waiting import eventually

SMALL = ("--group-size", "8", "--warm-up", "0.1")


def bench(*words: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    settings = environment(TMPDIR=str(temporary))
    return subprocess.run(
        command("bench", "transport", *words), env=settings, capture_output=True, text=True, timeout=90
    )


@contextmanager
def started(*words: str, temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    settings = environment(TMPDIR=str(temporary))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command("bench", "transport", *words), env=settings, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def all_children(process: "subprocess.Popen[str]") -> dict[str, int]:
    names = ("nats-server", "services.cli", "transport_load")
    await eventually(lambda: len(children(process, *names)) == 3, timeout=60, what="three kinds of children")
    return children(process, *names)


@pytest.mark.parametrize("shared_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_answered_row_is_counted_and_reaches_the_consumer_in_chunks(
    shared_memory: bool, tmp_path: Path
) -> None:
    way = "--shared-memory" if shared_memory else "--no-shared-memory"
    result = bench("--json", *SMALL, "--streams", "3", "--seconds", "2", way, temporary=tmp_path)
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = orjson.loads(result.stdout)
    assert (figures["observation"], figures["group_size"], figures["streams"]) == ([84, 84], 8, 3)
    assert figures["shared_memory"] is figures["pipes"] is shared_memory
    assert figures["device"] == str(resolve_device("auto"))
    assert figures["rows_per_second"] == pytest.approx(8 * figures["messages_per_second"])
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"]
    # 20 steps a chunk; one of each stream may lie on either side of the window's borders.
    chunks = figures["rows_per_second"] / 8 / 20
    assert figures["chunks_per_second"] == pytest.approx(chunks, abs=3 * 2 / 2 + 0.1 * chunks)
    assert 0 < figures["chunk_megabytes_per_second"] < figures["rows_per_second"] * 84 * 84 / 1e6 / 10
    assert figures["inference_cpu_seconds_per_row"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_json_a_table_is_printed(tmp_path: Path) -> None:
    result = bench(*SMALL, "--observation", "210,160,3", "--seconds", "1", temporary=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "210×160×3" in result.stdout
    assert "rows per second" in result.stdout


async def test_ctrl_c_ends_every_process_and_leaves_no_file(tmp_path: Path) -> None:
    with started(*SMALL, "--seconds", "600", temporary=tmp_path) as process:
        pids = await all_children(process)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)
    assert (process.returncode, *output) == (130, "", "seedrl: interrupted\n")
    assert not any(map(is_running, pids.values()))
    assert not os.listdir(tmp_path)


@pytest.mark.slow
async def test_nothing_runs_on_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    with started(*SMALL, "--seconds", "600", temporary=tmp_path) as process:
        pids = await all_children(process)
        process.kill()
        await eventually(lambda: not any(map(is_running, pids.values())), timeout=30, what="their end")


@pytest.mark.slow
async def test_an_inference_service_that_dies_ends_the_benchmark_in_words(tmp_path: Path) -> None:
    with started(*SMALL, "--seconds", "600", temporary=tmp_path) as process:
        pids = await all_children(process)
        os.kill(pids["services.cli"], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith("seedrl: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--group-size", "10000"), "a Step has 70630000 bytes"),
        (("--observation", "0,84"), "observation"),
        pytest.param(
            ("--observation", "700,700", "--group-size", "1"), "shorten the unroll", marks=pytest.mark.slow
        ),
        (("--device", "cuda:99"), "device cuda:99: there are"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(
    words: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    result = bench(*words, temporary=tmp_path)
    assert result.returncode == 2
    assert reason in one_clear_line(result)
    assert not list(tmp_path.iterdir())


def test_the_free_network_fulfils_the_contract() -> None:
    leaf = LeafSpec(name="observation", dtype="uint8", shape=(8, 8), low=(0.0,), high=(255.0,))
    environment_spec = EnvironmentSpec(observation=(leaf,), num_actions=6)
    network = NetworkSpec(name="free", frame_stack=4)
    check_network(FreeNetwork(environment=environment_spec, network=network), environment_spec, network)


def test_recorded_frames_are_pong_s_and_take_any_shape(tmp_path: Path) -> None:
    path = tmp_path / "frames.npz"
    assert record(path) == 6
    with np.load(path) as recorded:
        frames = recorded["frames"].reshape(200, 16, 84, 84)
    assert len(np.unique(frames)) > 3
    assert (frames[100] != frames[101]).any()
    same = recorded_steps(path, observation=(84, 84), group_size=20)
    rows = np.frombuffer(same[7].observation[0], np.uint8).reshape(20, 84, 84)
    np.testing.assert_array_equal(rows[:16], frames[7])
    np.testing.assert_array_equal(rows[16:], frames[7, :4])
    assert same[0].is_first == b"\1" * 20
    assert same[1].is_first == b"\0" * 20
    other = recorded_steps(path, observation=(100, 100, 1), group_size=2)
    row = np.frombuffer(other[7].observation[0], np.uint8).reshape(2, 10_000)[1]
    np.testing.assert_array_equal(row[:7056], frames[7, 1].ravel())
    np.testing.assert_array_equal(row[7056:], frames[7, 1].ravel()[:2944])
