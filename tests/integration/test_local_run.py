"""`seedrl train` as a person runs it: whole, interrupted, resumed, watched, joined, killed in parts."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gymnasium
import orjson
import pytest

from shared.policy import load_policy
from tests.support.commands import command, environment, modules_that_shadow, one_clear_line, seedrl
from tests.support.local_run import assert_exact, training
from tests.support.processes import killed_at_last
from tests.support.promtool import assert_clean_metrics

CARTPOLE = ("CartPole-v1", "--preset", "cartpole", "--seed", "1")
pytestmark = pytest.mark.timeout(300)


def test_a_run_ends_by_itself_and_leaves_everything_in_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    modules_that_shadow(tmp_path)
    with training(*CARTPOLE, "--total-steps", "8000", directory=directory, cwd=tmp_path) as run:
        output, _ = run.finish()
    summary = run.summary()
    assert summary["exit_reason"] == "total steps reached"
    assert summary["steps"] >= 8000
    assert summary["frames"] == summary["steps"]
    assert summary["mean_return_100"] > 8
    assert_exact(summary)
    assert summary["policy_lag"]["max"] <= 50
    for name in ("config.yaml", "checkpoints", "tensorboard", "logs"):
        assert (directory / name).exists()
    assert str(directory / "checkpoints") in output
    assert str(directory / "tensorboard") in output

    policy = load_policy(directory)
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=0)
    assert policy(observation, is_first=True) in (0, 1)

    oldest = min((directory / "checkpoints").glob("checkpoint-*"))
    result = seedrl("eval", oldest, "--episodes", "3", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluation = orjson.loads(result.stdout)
    assert evaluation["checkpoint"] == oldest.name
    assert evaluation["episodes"] == len(evaluation["returns"]) == 3


def test_an_interrupted_run_saves_exits_with_0_and_can_be_resumed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*CARTPOLE, directory=directory, cwd=tmp_path) as run:
        run.until_steps(3000)
        run.end(signal.SIGINT)
        assert run.process.returncode == 0
    first = run.summary()
    assert first["exit_reason"] == "interrupted"
    assert_exact(first)

    total = str(first["steps"] + 4000)
    words = ("CartPole-v1", "--resume", "--total-steps", total)
    other = seedrl("train", *words, "--run-dir", directory, "--hidden-sizes", "32", cwd=tmp_path)
    assert "network hidden_sizes is (32,), the run's is (" in one_clear_line(other)
    with training(*words, directory=directory, cwd=tmp_path) as run:
        run.finish()
    second = run.summary()
    assert second["steps"] >= int(total)
    assert second["updates"] > first["updates"]
    assert second["chunks"]["published"] > first["chunks"]["published"]
    assert second["chunks"]["rolled_back"] == 0
    assert_exact(second)


def test_a_run_that_is_interrupted_while_it_starts_has_trained_nothing_and_says_so(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_said("another actor: ")
        said, _ = run.end(signal.SIGINT)
        assert run.process.returncode == 0
    assert run.summary()["updates"] == 0
    assert "stopping: nothing was trained yet; another Ctrl-C ends all at once" in said
    assert "\nnothing was trained; " in said
    assert "seedrl eval" not in said


@pytest.mark.slow
def test_a_run_that_was_interrupted_while_it_was_paused_goes_on_with_resume(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*CARTPOLE, directory=directory, cwd=tmp_path) as run:
        run.until_steps(500)
        assert seedrl("control", "pause", directory, cwd=tmp_path).returncode == 0
        run.end()
        steps = run.summary()["steps"]
    with training("CartPole-v1", "--resume", directory=directory, cwd=tmp_path) as run:
        run.until_steps(steps + 500)
        run.end()


def test_a_run_in_progress_is_not_resumed_and_not_written_to(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*CARTPOLE, directory=directory, cwd=tmp_path) as run:
        run.until_steps(500)
        before = (directory / "config.yaml").read_bytes()
        words = ("train", "CartPole-v1", "--run-dir", directory, "--resume", "--learning-rate", "0.5")
        second = seedrl(*words, cwd=tmp_path)
        assert "is in use by another seedrl train" in one_clear_line(second)
        assert (directory / "config.yaml").read_bytes() == before
        run.end()
    assert run.summary()["exit_reason"] == "interrupted"


def test_a_run_that_cannot_save_says_so_and_fails(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*CARTPOLE, directory=directory, cwd=tmp_path) as run:
        run.until_steps(500)
        (directory / "checkpoints").rename(directory / "moved")
        (directory / "checkpoints").touch()  # in the way of what is saved
        _, said = run.end()
    assert run.process.returncode == 2, said
    assert "seedrl: learner: cannot write checkpoint" in said
    assert run.summary()["exit_reason"].startswith("failed: learner: cannot write checkpoint")
    assert_exact(run.summary())


def test_a_service_that_fails_for_good_leaves_a_summary(tmp_path: Path) -> None:
    with training(*CARTPOLE, "--learning-rate", "1e30", directory=tmp_path / "run", cwd=tmp_path) as run:
        _, said = run.process.communicate(timeout=120)
    assert run.process.returncode == 5, said
    assert "seedrl: learner: training diverged" in said
    summary = run.summary()
    assert summary["exit_reason"].startswith("failed: learner: training diverged")
    assert summary["steps"] > 0
    assert_exact(summary)
    assert not run.connection()


@pytest.mark.slow
def test_a_run_whose_nats_server_keeps_dying_ends_with_a_summary(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(500)
        binary = str(Path(sys.executable).with_name("nats-server"))
        killed: set[int] = set()
        while run.process.poll() is None:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                server = run.pid(binary)
                if server not in killed:
                    os.kill(server, signal.SIGKILL)
                    killed.add(server)
            time.sleep(0.02)  # polls processes; nothing to await
        _, said = run.process.communicate()
    assert run.process.returncode in (1, 2)
    assert len([line for line in said.splitlines() if line.startswith("seedrl: nats-server")]) == 1
    summary = run.summary()
    assert summary["exit_reason"].startswith("failed: nats-server")
    assert summary["steps"] >= 500
    assert not run.connection()


def test_a_run_can_be_watched_paused_and_stopped_from_another_shell(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with training(*CARTPOLE, directory=directory, cwd=tmp_path) as run:
        run.until_steps(1000)
        status = seedrl("status", directory, cwd=tmp_path)
        assert status.returncode == 0, status.stderr
        for row in ("inference", "learner", "actor actor-0", "2 groups, 16 environments"):
            assert row in status.stdout
        assert "restarts" not in status.stdout

        assert seedrl("control", "pause", directory, cwd=tmp_path).returncode == 0
        # What was on its way when the actions stopped is consumed while a checkpoint is written.
        assert "checkpoint" in seedrl("control", "checkpoint", directory, cwd=tmp_path).stdout
        settled = run.accounts()["steps"]
        assert seedrl("control", "status", directory, cwd=tmp_path).returncode == 0
        assert run.accounts()["steps"] - settled <= 2000
        assert "waiting for resume (the run is paused)" in seedrl("status", directory, cwd=tmp_path).stdout
        assert seedrl("control", "resume", directory, cwd=tmp_path).returncode == 0
        run.until_steps(settled + 4000)

        assert seedrl("control", "stop", directory, cwd=tmp_path).returncode == 0
        run.finish()
    assert run.summary()["exit_reason"] == "stopped"
    assert_exact(run.summary())


def test_a_second_interrupt_ends_a_run_whose_learner_does_not_end(tmp_path: Path) -> None:
    with training(*CARTPOLE, "--grace-seconds", "60", directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until(lambda: bool(run.accounts().get("updates")))
        learner = run.pid("learner")
        os.kill(learner, signal.SIGSTOP)  # before its status says that anything was trained
        run.process.send_signal(signal.SIGINT)
        run.until_said("stopping: what was learned is saved; another Ctrl-C ends all at once")
        run.end(signal.SIGINT, seconds=30)
        assert run.process.returncode == 0
    assert not Path(f"/proc/{learner}").exists()
    assert run.summary()["exit_reason"] == "interrupted"


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_any_more_what_it_says(tmp_path: Path) -> None:
    with training(*CARTPOLE, "--max-seconds", "10", directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_said("training")
        assert run.process.stdout is not None
        run.process.stdout.close()
        assert run.process.wait(timeout=60) == 0
    assert run.summary()["exit_reason"] == "time limit reached"


@pytest.mark.slow
@pytest.mark.parametrize("service", ["inference", "actor"])
def test_a_service_that_somebody_else_ends_is_started_again(service: str, tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(1000)
        os.kill(run.pid(service), signal.SIGTERM)
        words = run.until_said(f"{service}{'-0' if service == 'actor' else ''} ended once by itself")
        assert "/logs/" in words
        before = run.accounts()["steps"]
        run.until_steps(before + 10_000)
        run.end()
    assert_exact(run.summary())


def test_a_terminal_shows_what_each_service_does_and_the_bottleneck(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = command("train", *CARTPOLE, "--run-dir", tmp_path / "run")
    settings = environment(TERM="xterm", COLUMNS="300")
    process = subprocess.Popen(words, cwd=tmp_path, env=settings, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, is_ended = "", False
    with killed_at_last(process):
        with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # it ends with EIO
            while piece := terminal.read(65536):
                shown += piece.decode(errors="replace")
                if not is_ended and re.search(r"bottleneck: \w+: [^│]* busy\)", shown):
                    process.send_signal(signal.SIGINT)
                    is_ended = True
        assert process.wait(timeout=60) == 0, shown[-3000:]
    for row in ("inference", "learner", "actor-0", "running", "updates/s"):
        assert row in shown
    assert "interrupted: " in shown, shown[-1500:]


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=10) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


def test_every_service_answers_health_status_and_clean_metrics(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(1000)
        addresses = run.http_addresses()
        assert set(addresses) == {"actor-0", "inference", "learner"}
        for address in addresses.values():
            run.until(lambda address=address: is_ready(address), seconds=20)
            answers = {}
            for path in ("healthz", "readyz", "metrics", "status"):
                with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as response:
                    answers[path] = response.read()
            assert orjson.loads(answers["status"])
            assert_clean_metrics(answers["metrics"].decode())
        run.end()


@pytest.mark.slow
def test_a_second_actor_joins_and_leaves_without_an_error_anywhere(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(1000)
        config = run.directory / "config.yaml"
        where = ("--preset", config, "--inference-url", run.connection()["inference_url"])
        guest = subprocess.Popen(
            command(
                "actor", "CartPole-v1", *where, "--actor-id", "guest", "--groups", "1", "--group-size", "5"
            ),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def rows_of_guest() -> list[int]:
            result = seedrl("status", run.directory, "--json", cwd=tmp_path)
            answers = orjson.loads(result.stdout)
            inference = next(answer["status"] for answer in answers if answer["service"] == "inference")
            return [stream["rows"] for stream in inference["streams"] if stream["actor_id"] == "guest"]

        with killed_at_last(guest):
            run.until(lambda: rows_of_guest() == [5])
            guest.send_signal(signal.SIGTERM)
            started = time.monotonic()
            output, _ = guest.communicate(timeout=30)
        assert guest.returncode == 0, output
        assert time.monotonic() - started < 2.0
        run.until(lambda: rows_of_guest() == [])
        run.until_steps(run.accounts()["steps"] + 2000)
        run.end()
        assert '"level":"error"' not in run.logs()
    assert_exact(run.summary())


@pytest.mark.slow
def test_an_actor_whose_spaces_do_not_fit_the_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with training(*CARTPOLE, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(500)
        reach = run.connection()
        where = ("--inference-url", reach["inference_url"], "--run-id", reach["run_id"])
        result = seedrl("actor", "Acrobot-v1", *where, cwd=tmp_path)
        assert result.returncode == 4, result
        assert "Traceback" not in result.stderr
        assert "the run has 2 actions, this environment 3" in result.stderr
        run.end()


def test_every_service_can_be_killed_and_the_accounts_stay_exact(tmp_path: Path) -> None:
    words = (*CARTPOLE, "--checkpoint-seconds", "2")
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        run.until_steps(4000)
        for service in ("actor", "inference", "learner"):
            killed = run.pid(service)
            os.kill(killed, signal.SIGKILL)
            run.until_steps(run.accounts()["steps"] + 8000, seconds=90)
            assert run.pid(service) != killed
        run.end()
        assert run.process.returncode == 0
    summary = run.summary()
    assert_exact(summary)
    assert summary["chunks"]["trained"] > 0


@pytest.mark.slow
def test_two_runs_side_by_side_on_one_server_do_not_meet(tmp_path: Path) -> None:
    patient = ("--max-policy-lag", "10000")  # so that nothing is refused because the machine is busy
    with training(*CARTPOLE, *patient, directory=tmp_path / "a", cwd=tmp_path) as host:
        host.until(lambda: bool(host.connection()))
        url = host.connection()["nats_url"]
        token = host.connection()["nats_token"]
        words = ("Acrobot-v1", "--total-steps", "4000", "--nats-url", url, *patient)
        with training(*words, directory=tmp_path / "b", cwd=tmp_path, SEEDRL_NATS_TOKEN=token) as guest:
            guest.finish()
        host.until_steps(2000)
        host.end()
    for run in (host, guest):
        assert_exact(run.summary())
        refused = run.summary()["chunks"]["refused_by_reason"]
        assert {**refused, "lag": 0} == dict.fromkeys(
            refused, 0
        )  # the other run's would be no chunks of this
