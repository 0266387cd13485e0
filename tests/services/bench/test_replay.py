import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from services.actor.environments import GroupMaker
from services.bench.replay_chunks import Recording, recorded, renamed
from services.bench.replay_config import ReplayBenchConfig
from services.bench.replay_core import core_figures
from shared.wire.chunk_rows import split_message
from shared.wire.chunks import decode_chunk
from tests.support.commands import command, environment, one_clear_line
from tests.support.processes import children, is_running
from tests.support.waiting import eventually

SHAPE = ("--unroll", "4", "--burn-in", "4", "--sequence-length", "8", "--lstm-size", "8", "--batch-size", "8")
SMALL = (*SHAPE, "--environments", "3", "--recorded-sequences", "3", "--window-seconds", "0.1")
SETTINGS: dict[str, Any] = {
    "network": "nature",
    "frame_stack": 4,
    "unroll": 4,
    "burn_in": 4,
    "sequence_length": 8,
    "lstm_size": 8,
    "batch_size": 8,
    "environments": 3,
    "recorded_sequences": 3,
    "windows": 1,
    "window_seconds": 0.05,
}


def bench(*words: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    settings = environment(TMPDIR=str(temporary))
    return subprocess.run(
        command("bench", "replay", *words), env=settings, capture_output=True, text=True, timeout=90
    )


@contextmanager
def started(temporary: Path) -> Iterator["subprocess.Popen[str]"]:
    settings = environment(TMPDIR=str(temporary))
    pipe = subprocess.PIPE
    words = command("bench", "replay", *SMALL, "--windows", "100000")
    with subprocess.Popen(words, env=settings, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def all_children(process: "subprocess.Popen[str]") -> dict[str, int]:
    names = ("nats-server", "services.cli")
    await eventually(lambda: len(children(process, *names)) == 2, timeout=60, what="NATS and replay")
    return children(process, *names)


def recording(config: ReplayBenchConfig) -> Recording:
    maker = GroupMaker(env=config.env, group_size=config.environments)
    return recorded(maker, config, run_id="bench", chunks=config.chunks, seed=1)


def test_what_replay_took_and_gave_is_counted_per_second(tmp_path: Path) -> None:
    result = bench("--json", *SMALL, "--windows", "2", "--streams", "2", temporary=tmp_path)
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = orjson.loads(result.stdout)
    assert (figures["sequences"], figures["batch_size"], figures["windows"]) == (2 * 3 * 3, 8, 2)
    # 3 sequences of 3 chunks, of which each two share one: 7 messages.
    assert figures["messages_per_second"] == pytest.approx(figures["inserts_per_second"] * 2 * 7 / 18)
    for name in ("inserts", "samples", "updates"):
        assert 0 < figures[f"{name}_per_second"] < figures[f"core_{name}_per_second"]
    assert 0 < figures["bytes_per_step"] < 84 * 84 / 10
    assert not list(tmp_path.iterdir())


def test_without_json_a_table_is_printed(tmp_path: Path) -> None:
    result = bench(*SMALL, "--windows", "1", "--env", "CartPole-v1", "--network", "mlp", temporary=tmp_path)
    assert result.returncode == 2, "the preset's arguments are Atari's"
    kwargs = ("--env-kwargs", "{}", "--frame-stack", "1")
    result = bench(
        *(*SMALL, "--windows", "1", "--env", "CartPole-v1", "--network", "mlp", *kwargs), temporary=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "CartPole-v1" in result.stdout
    assert "core samples per second" in result.stdout


async def test_ctrl_c_ends_every_process_and_leaves_no_file(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        pids = await all_children(process)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)
    assert (process.returncode, *output) == (130, "", "seedrl: interrupted\n")
    assert not any(map(is_running, pids.values()))
    assert not os.listdir(tmp_path)


async def test_a_replay_that_dies_ends_the_benchmark_in_words(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        pids = await all_children(process)
        os.kill(pids["services.cli"], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith("seedrl: replay ended")
    assert len(errors.splitlines()) == 1


def test_only_presets_of_r2d2_are_measured(tmp_path: Path) -> None:
    result = bench("--preset", "atari_vtrace", temporary=tmp_path)
    assert result.returncode == 2
    assert "only r2d2 has a replay" in one_clear_line(result)


def test_recorded_chunks_join_and_remember_what_the_policy_saw() -> None:
    config = ReplayBenchConfig.model_validate(SETTINGS)
    chunks = [decode_chunk(message) for message in recording(config).messages]
    assert [chunk.header.number for chunk in chunks] == list(range(7))
    assert chunks[0].is_first[:, 0].all()
    assert not chunks[0].history["observation"].any()
    for earlier, later in pairwise(chunks):
        frames = earlier.observation["observation"]
        np.testing.assert_array_equal(later.observation["observation"][:, 0], frames[:, -1])
        np.testing.assert_array_equal(later.history["observation"], frames[:, -4:-1])
        np.testing.assert_array_equal(later.previous_action, earlier.action[:, -1])
        assert (later.state[0] != earlier.state[0]).all()
        assert later.td_errors is not None
        assert later.td_errors.all()
    assert (chunks[2].observation["observation"] != chunks[6].observation["observation"]).any()


def test_recorded_history_does_not_reach_into_an_earlier_episode() -> None:
    settings = {**SETTINGS, "env": "CartPole-v1", "network": "mlp", "recorded_sequences": 10}
    chunks = [decode_chunk(m) for m in recording(ReplayBenchConfig.model_validate(settings)).messages]
    hidden = 0
    for earlier, later in pairwise(chunks):
        ((name, frames),) = earlier.observation.items()
        for back in (1, 2, 3):
            begun = earlier.is_first[:, -back:].any(axis=1)
            expected = np.where(begun[:, None], 0, frames[:, -1 - back])
            np.testing.assert_array_equal(later.history[name][:, -back], expected)
            hidden += int(begun.sum())
    assert hidden, "an episode must begin shortly before a chunk"


def test_a_renamed_chunk_is_the_same_of_another_stream() -> None:
    message = recording(ReplayBenchConfig.model_validate({**SETTINGS, "recorded_sequences": 1})).messages[0]
    other = renamed(message, "other")
    assert decode_chunk(other).header == replace(decode_chunk(message).header, stream_id="other")
    np.testing.assert_array_equal(split_message(other).td_errors, split_message(message).td_errors)


def test_the_core_is_filled_with_all_that_was_recorded(tmp_path: Path) -> None:
    config = ReplayBenchConfig.model_validate(SETTINGS)
    messages = recording(config).messages
    figures = core_figures(config, config.replay(run_id="bench", run_dir=tmp_path), messages)
    stored = sum(len(record) for message in messages for record in split_message(message).records)
    assert figures.bytes_per_step == pytest.approx(stored / (7 * 3 * 4), rel=0.05)
    assert min(figures) > 0
