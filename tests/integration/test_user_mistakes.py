"""Each mistake of a person gives one clear line and a non-zero exit, no traceback."""

import signal
import socket
from pathlib import Path

import orjson
import pytest

from services.nats_server import NatsServer
from tests.support.commands import one_clear_line, seedrl
from tests.support.local_run import training


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train"], "ENV"),
        (["train", "NoSuch-v0"], "NoSuch"),
        (["train", "CartPole-v1", "--preset", "nope"], "unknown preset 'nope'"),
        (["train", "CartPole-v1", "--speed", "9"], "--speed"),
        (["train", "CartPole-v1", "--learning-rate", "-1"], "--learning-rate"),
        (["train", "CartPole-v1", "--total-steps", "many"], "--total-steps"),
        (
            ["train", "CartPole-v1", "--learning-rate", "inf"],
            "--learning-rate: Input should be a finite number",
        ),
        (["train", "CartPole-v1", "--max-seconds", "nan"], "--max-seconds"),
        (["train", "CartPole-v1", "--role", "eval"], "--role"),
        (["train", "CartPole-v1", "--network", "nope"], "nope"),
        (["train", "CartPole-v1", "--network", "no_such_module:Net"], "no_such_module"),
        (["train", "no_such_package:Env-v0"], "no_such_package"),
        (["train", "Pendulum-v1"], "Box"),
        (["train", "CartPole-v1", "--run-dir", "/proc/nothing"], "/proc/nothing"),
        (["train", "CartPole-v1", "--run-dir", "nothing-here", "--resume"], "nothing-here"),
        (["train", "CartPole-v1", "--resume"], "--resume wants --run-dir"),
        (["train", "CartPole-v1", "--run-id", "a b"], "--run-id"),
        (["train", "CartPole-v1", "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["learner", "--network", "no_such_module:Net"], "no module no_such_module"),
        (["inference", "--network", "no_such_module:Net"], "no module no_such_module"),
        (["eval", "nothing-here"], "nothing-here"),
        (["status", "nothing-here"], "nothing-here"),
        (["control", "explode", "nothing-here"], "explode"),
        (["status", "--nats-url", "nats://127.0.0.1:9", "--connect-timeout", "1"], "127.0.0.1:9"),
        (["train", "CartPole-v1", "--nats-url", "127.0.0.1:9", "--connect-timeout", "1"], "127.0.0.1:9"),
        (["learner", "--nats-url", "no url"], "no url"),
        (["actor"], "ENV"),
        (["actor", "NoSuch-v0"], "NoSuch"),
        (["inference", "--port", "99999"], "--port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_said_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in one_clear_line(seedrl(*words, cwd=tmp_path))


def test_an_unknown_environment_variable_is_named(tmp_path: Path) -> None:
    result = seedrl("train", "CartPole-v1", cwd=tmp_path, settings={"SEEDRL_TOTAL_STEP": "5"})
    assert "SEEDRL_TOTAL_STEP is no setting; did you mean SEEDRL_TOTAL_STEPS?" in one_clear_line(result)


def test_a_variable_of_another_program_that_is_called_as_an_option_is_none(tmp_path: Path) -> None:
    result = seedrl("status", "nothing-here", cwd=tmp_path, settings={"JSON": "banana"})
    assert "nothing-here" in one_clear_line(result)


def test_malformed_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("unroll: [")
    result = seedrl("train", "CartPole-v1", "--preset", "mine.yaml", cwd=tmp_path)
    assert "mine.yaml" in one_clear_line(result)


def test_a_run_directory_that_is_in_use_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    line = one_clear_line(seedrl("train", "CartPole-v1", "--run-dir", "run", cwd=tmp_path))
    assert "not empty" in line


@pytest.mark.slow
def test_a_failed_start_does_not_use_up_its_directory(tmp_path: Path) -> None:
    (tmp_path / "empty_package.py").touch()
    words = ("train", "empty_package:Env-v0", "--run-dir", "run")
    for _ in range(2):
        assert "unknown environment 'Env-v0'" in one_clear_line(seedrl(*words, cwd=tmp_path))
    summary = orjson.loads((tmp_path / "run" / "summary.json").read_bytes())
    assert summary["exit_reason"].startswith("failed: actor-0: ")
    assert "no run goes on" in one_clear_line(seedrl("status", "run", cwd=tmp_path))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("CartPole-v11", "unknown environment 'CartPole-v11'; did you mean CartPole-v1 or "),
        ("no_such_package:Env-v0", "there is no module 'no_such_package' in the working directory"),
    ],
)
def test_training_in_an_environment_that_is_not_there_ends_before_anything_starts(
    env: str, words: str, tmp_path: Path
) -> None:
    result = seedrl("train", env, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert words in one_clear_line(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("no.mod:Net", "network no.mod:Net: there is no module no"),
        ("mpl", "unknown network 'mpl'; there are auto, mlp, nature, "),
    ],
)
def test_training_with_a_network_that_is_not_there_ends_before_anything_starts(
    network: str, words: str, tmp_path: Path
) -> None:
    result = seedrl("train", "CartPole-v1", "--network", network, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert words in one_clear_line(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "tpu"], "--device: must be auto, cpu, cuda or cuda:N"),
        (["--tls-ca", "nofile"], "--tls-ca: cannot read nofile"),
        (["--max-environments", "4"], "max_environments (4) must be at least actors"),
        (["--hidden-sizes", "64,0"], "--hidden-sizes: "),
        (["--seed", str(2**70)], "--seed: "),
        (["--preset", "../missing.yaml"], "preset ../missing.yaml: there is no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_training_with_what_a_service_would_refuse_ends_before_anything_starts(
    words: list[str], said: str, tmp_path: Path
) -> None:
    result = seedrl("train", "CartPole-v1", "--run-dir", "run", *words, cwd=tmp_path)
    assert result.returncode == 2
    assert said in one_clear_line(result)
    assert not (tmp_path / "run").exists()


def test_training_at_a_port_in_use_ends_before_a_service_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = seedrl("train", "CartPole-v1", "--port", port, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in one_clear_line(result)
    assert not list(tmp_path.glob("run/logs/*.log"))


TROUBLE = ("tests.support.actor_environments:Trouble-v0", "--preset", "cartpole", "--env-kwargs")


@pytest.mark.slow  # half a minute: the actor is started six times
def test_an_environment_that_is_never_finite_ends_the_run_and_is_named(tmp_path: Path) -> None:
    words = (*TROUBLE, '{"trouble": "nan", "at": 1}')
    result = seedrl("train", *words, "--run-dir", "run", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("seedrl: ")]
    assert line.endswith(
        f"environment {TROUBLE[0]} crashed 10 times in a row, "
        "at last with NotFinite: observation 'observation' is not finite as float32: nan"
    )


@pytest.mark.slow
def test_an_environment_that_is_not_finite_now_and_then_is_told_of_while_training_goes_on(
    tmp_path: Path,
) -> None:
    words = (*TROUBLE, '{"trouble": "inf", "at": 50}')
    with training(*words, directory=tmp_path / "run", cwd=tmp_path) as run:
        said = run.until_said("crashed environments replaced")
        run.until_steps(500)
        run.end(signal.SIGINT)
    assert "at last with NotFinite: reward is not finite as float32: inf" in said
    assert run.summary()["steps"] > 0
    assert "stream refused" not in (tmp_path / "run/logs/inference.log").read_text()


def test_an_environment_that_hangs_while_it_is_made_is_named(tmp_path: Path) -> None:
    with training(*TROUBLE, '{"trouble": "made"}', directory=tmp_path / "run", cwd=tmp_path) as run:
        said = run.until_said("actor-0: making environments for")
        run.end(signal.SIGINT)
    assert "inference: " in said
    assert run.summary()["exit_reason"] == "interrupted"


@pytest.mark.parametrize("name", ["config.yaml", "connection.json"])
def test_a_damaged_file_of_a_run_is_named(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("env: CartPole-v1\n")
    (run / name).write_text("{")
    words = {"config.yaml": ["train", "CartPole-v1", "--resume", "--run-dir"], "connection.json": ["status"]}
    line = one_clear_line(seedrl(*words[name], run, cwd=tmp_path))
    assert name in line
    assert "not YAML" in line or "is damaged" in line


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_port_in_use_is_named(option: str, tmp_path: Path, nats: NatsServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        other = "--http-port" if option == "--port" else "--port"
        words = ["inference", "--nats-url", nats.url, option, port, other, "0"]
        result = seedrl(*words, cwd=tmp_path, settings={"SEEDRL_NATS_TOKEN": str(nats.token)})
        assert f"127.0.0.1:{port}" in one_clear_line(result)


@pytest.mark.parametrize("service", ["inference", "learner"])
def test_a_wrong_token_is_refused(service: str, tmp_path: Path, nats: NatsServer) -> None:
    words = [service, "--nats-url", nats.url, *(["--port", "0"] if service == "inference" else [])]
    line = one_clear_line(seedrl(*words, cwd=tmp_path, settings={"SEEDRL_NATS_TOKEN": "wrong"}))
    assert "token" in line
    assert "wrong" not in line.replace("wrong token", "")
