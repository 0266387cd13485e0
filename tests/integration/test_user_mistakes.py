"""Each mistake of a person gives one clear line and a non-zero exit, no traceback."""

import socket
from pathlib import Path

import pytest

from services.nats_server import NatsServer
from tests.support.commands import one_clear_line, seedrl


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
        (["train", "CartPole-v1", "--network", "nope"], "nope"),
        (["train", "CartPole-v1", "--network", "no_such_module:Net"], "no_such_module"),
        (["train", "no_such_package:Env-v0"], "no_such_package"),
        (["train", "Pendulum-v1"], "Box"),
        (["train", "CartPole-v1", "--run-dir", "/proc/nothing"], "/proc/nothing"),
        (["train", "CartPole-v1", "--run-dir", "nothing-here", "--resume"], "nothing-here"),
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


def test_malformed_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("unroll: [")
    result = seedrl("train", "CartPole-v1", "--preset", "mine.yaml", cwd=tmp_path)
    assert "mine.yaml" in one_clear_line(result)


def test_a_run_directory_that_is_in_use_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    line = one_clear_line(seedrl("train", "CartPole-v1", "--run-dir", "run", cwd=tmp_path))
    assert "not empty" in line


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
