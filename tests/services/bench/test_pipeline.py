"""`seedrl bench pipeline`: its arithmetic, and a small real one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from services.bench.measuring import Reading, Window, measurement, steps_trained
from services.bench.pipeline import bound
from services.bench.stages import StageTurn, turn_alone
from services.local.config import TrainConfig
from shared.errors import RunError
from tests.support.commands import ROOT, command, environment, modules_that_shadow
from tests.support.processes import children, is_running, killed_at_last, state
from tests.support.waiting import eventually

SMALL = ["bench", "pipeline", "--env", "CartPole-v1", "--preset", "cartpole", "--json"]
SHORT = ["--windows", "2", "--window-seconds", "2", "--stage-seconds", "0.2", "--warm-up-seconds", "0"]


def no_bound(costs: object) -> float:
    return 1.0


def reading(seconds: float, steps: float, *, busy: float, cpu: float) -> Reading:
    return Reading(seconds, steps, {"learner": busy}, {"learner": cpu})


def window(before: Reading, after: Reading, **alone: StageTurn) -> Window:
    return Window(before, after, dict(alone))  # type: ignore[arg-type]


def test_speed_and_costs_are_medians_of_the_windows_and_waiting_is_over_all() -> None:
    found = measurement(
        [
            window(reading(0.0, 0, busy=0.0, cpu=1.0), reading(10.0, 1000, busy=9.0, cpu=4.0)),
            # disturbed:
            window(reading(15.0, 1200, busy=12.0, cpu=5.0), reading(25.0, 1300, busy=13.0, cpu=6.0)),
            window(reading(30.0, 1300, busy=13.0, cpu=6.0), reading(50.0, 3500, busy=29.0, cpu=8.6)),
        ],
        no_bound,
    )
    assert found.windows == [100.0, 10.0, 110.0]
    assert found.steps_per_second == 100.0
    assert found.waiting == {"learner": pytest.approx(1 - 26 / 40)}
    assert found.cpu_seconds_per_step == {"learner": pytest.approx(3e-3)}


def test_a_stages_turn_alone_is_no_time_of_the_pipeline() -> None:
    alone = StageTurn(cost_seconds=1.0, steps=1000, still_seconds=2.0)
    found = measurement(
        [window(reading(0.0, 0, busy=0.0, cpu=0.0), reading(10.0, 400, busy=5.0, cpu=1.0), env=alone)],
        no_bound,
    )
    assert found.alone == {"env": pytest.approx(1e-3)}
    assert found.windows == [pytest.approx(400 / 8.0)]
    assert found.waiting == {"learner": pytest.approx(0.5)}  # who is stopped at work is at work meanwhile


def test_the_efficiency_is_the_median_of_what_each_window_says() -> None:
    def at_speed(speed: float, *, efficiency: float) -> Window:
        alone = StageTurn(cost_seconds=efficiency / speed, steps=1, still_seconds=0.0)
        return window(reading(0.0, 0, busy=0.0, cpu=0.0), reading(1.0, speed, busy=0.0, cpu=0.0), env=alone)

    windows = [
        at_speed(100.0, efficiency=0.8),
        at_speed(300.0, efficiency=0.7),
        at_speed(200.0, efficiency=0.9),
    ]
    found = measurement(windows, lambda costs: 1 / costs["env"])
    assert found.steps_per_second == pytest.approx(200.0)
    assert found.bound == pytest.approx(200 / 0.9)
    assert found.efficiencies == pytest.approx([0.8, 0.7, 0.9])
    assert found.efficiency == pytest.approx(0.8)


def test_reset_steps_are_none_of_either_agents_steps() -> None:
    of = {"env": "CartPole-v1", "run_dir": "run"}
    actors = [
        {("seedrl_actor_steps_total", ""): 70.0, ("seedrl_actor_reset_steps_total", ""): 30.0},
        {("seedrl_actor_steps_total", ""): 95.0, ("seedrl_actor_reset_steps_total", ""): 5.0},
    ]
    r2d2 = TrainConfig.model_validate({**of, "agent": "r2d2", "sequence_length": 80, "replay_ratio": 2})
    sequences = {("seedrl_learner_sequences_total", ""): 50.0}
    assert steps_trained(r2d2, sequences, actors) == pytest.approx(50 * 80 / 2 * 165 / 200)
    vtrace = TrainConfig.model_validate(of)
    learner = {
        ("seedrl_learner_steps_total", ""): 400.0,
        ("seedrl_learner_chunks_total", "trained"): 3.0,
        ("seedrl_learner_chunks_total", "refused_lag"): 1.0,
    }
    assert steps_trained(vtrace, learner, actors) == 300.0


def test_a_window_without_a_step_is_an_error_in_words() -> None:
    same = window(reading(0.0, 5, busy=0.0, cpu=0.0), reading(1.0, 5, busy=0.0, cpu=0.0))
    with pytest.raises(RunError, match="nothing was trained within a window"):
        measurement([same], no_bound)


def test_the_bound_shares_the_cores_on_a_cpu_and_takes_the_slower_side_beside_an_accelerator() -> None:
    assert bound({"env": 3e-4, "inference": 1e-4, "learner": 1e-4}, cores=2, on_cpu=True) == pytest.approx(
        4000
    )
    slow_cores = bound({"env": 3e-4, "inference": 1e-6, "learner": 1e-6}, cores=3, on_cpu=False)
    slow_device = bound({"env": 3e-6, "inference": 1e-4, "learner": 1e-4}, cores=3, on_cpu=False)
    assert (slow_cores, slow_device) == (pytest.approx(10_000), pytest.approx(5000))


def test_a_small_pipeline_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    modules_that_shadow(tmp_path)
    env = environment() | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command(*SMALL, *SHORT), capture_output=True, text=True, timeout=110, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    figures = orjson.loads(done.stdout)
    costs = [figures[f"{stage}_seconds_per_step"] for stage in ("env", "inference", "learner")]
    assert all(0 < cost < 1e-3 for cost in costs)
    assert figures["bound_steps_per_second"] == pytest.approx(figures["cores"] / sum(costs), rel=0.3)
    assert 0 < figures["efficiency"] < 1.2
    assert figures["cores"] == len(os.sched_getaffinity(0))
    assert set(figures["waiting"]) == {"actor", "inference", "learner"}
    assert all(0 <= share <= 1 for share in figures["waiting"].values())
    assert all(0 < seconds < 1e-2 for seconds in figures["cpu_seconds_per_step"].values())
    assert list(tmp_path.glob("seedrl-*")) == []


@pytest.mark.slow
def test_a_small_pipeline_of_r2d2_is_measured(tmp_path: Path) -> None:
    words = ("bench", "pipeline", "--env", "CartPole-v1", "--preset", "cartpole_r2d2", "--json")
    done = subprocess.run(
        command(*words, *SHORT, "--window-seconds", "6"),
        capture_output=True,
        text=True,
        timeout=170,
        env=environment() | {"TMPDIR": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    figures = orjson.loads(done.stdout)
    assert all(figures[f"{stage}_seconds_per_step"] > 0 for stage in ("env", "inference", "learner"))
    assert set(figures["cpu_seconds_per_step"]) == {"actor", "inference", "replay", "learner", "nats"}
    assert all(seconds > 0 for seconds in figures["cpu_seconds_per_step"].values())
    assert figures["steps_per_second"] > 0
    assert list(tmp_path.glob("seedrl-*")) == []


def test_what_an_environment_prints_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(
        "import gymnasium\n"
        "print('hello from the module')\n"
        "gymnasium.register('Talking-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "services.bench.stages", "env", "--env", "talking:Talking-v0"],
        input="[]\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=environment() | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert len(orjson.loads(line)) == 3
    assert "hello from the module" in done.stderr


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    env = environment() | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command(*SMALL), stdout=-1, stderr=-1, text=True, env=env, cwd=tmp_path)
    with killed_at_last(process):
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("seedrl-bench-*/config.yaml")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)  # polls a directory; nothing to await
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "seedrl: interrupted\n")
    assert list(tmp_path.glob("seedrl-*")) == []


async def test_others_stand_still_while_a_stage_is_measured() -> None:
    other = await asyncio.create_subprocess_exec("sleep", "60")
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    states = []

    def work() -> float:
        states.append(state(other.pid))
        return 10.0

    times = iter([3.0, 7.0])
    try:
        began = time.monotonic()
        turn = turn_alone(work, seconds=0.1, clock=lambda: next(times), beside=[gone.pid, other.pid])
        assert (turn.cost_seconds, turn.steps) == (4.0, 10.0 * len(states))
        assert 0.1 <= turn.still_seconds <= time.monotonic() - began
        assert states[-1] == "T"
        await eventually(lambda: state(other.pid) == "S")
    finally:
        other.kill()
        await other.wait()


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the bench", "the stage"])
async def test_what_stands_still_ends_with_who_made_it(killed: str, tmp_path: Path) -> None:
    env = environment() | {"TMPDIR": str(tmp_path)}
    words = command(*SMALL, *SHORT, "--stage-seconds", "2")
    process = await asyncio.create_subprocess_exec(*words, stderr=-1, env=env, cwd=tmp_path)
    services = ("services.cli\0inference", "services.cli\0learner", "services.cli\0actor", "nats-server")

    def standing() -> list[int]:
        found = list(children(process, *services).values())
        return found if len(found) == 4 and all(state(pid) == "T" for pid in found) else []

    stopped = await eventually(standing, timeout=60)
    if killed == "the bench":
        process.kill()
    else:
        os.kill(children(process, "services.bench.stages\0env")["services.bench.stages\0env"], signal.SIGKILL)
        _, said = await process.communicate()
        assert said == b"seedrl: stage env alone failed: it said nothing\n"
    await process.wait()
    await eventually(lambda: not any(map(is_running, stopped)), timeout=20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "nothing"], "unknown command 'bench nothing'; there are train"),
        (["bench", "pipeline", "--windows", "0"], "--windows: "),
        (["bench", "pipeline", "--stage-seconds", "2.5"], "--stage-seconds: "),
        (["bench", "pipeline", "--env", "Nowhere-v0", *SHORT], "stage env alone failed: unknown environment"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path
    )
    assert done.returncode != 0
    assert done.stderr.startswith(f"seedrl: {words}")
    assert done.stderr.count("\n") == 1
