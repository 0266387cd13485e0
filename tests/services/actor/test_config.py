import pytest

from services.actor.config import ActorConfig
from shared.config import load
from shared.errors import ConfigurationError


def loaded(*arguments: str) -> ActorConfig:
    return load(ActorConfig, arguments, prog="seedrl actor")


def test_environment_arguments_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"difficulty": 2, "names": ["a"], "flag": true}'
    arguments = {"difficulty": 2, "names": ["a"], "flag": True}
    assert loaded("Env-v0", "--env-kwargs", text).env_kwargs == arguments
    monkeypatch.setenv("SEEDRL_ENV_KWARGS", text)
    assert loaded("Env-v0").env_kwargs == arguments
    monkeypatch.setenv("SEEDRL_ENV_KWARGS", "difficulty=2")
    with pytest.raises(ConfigurationError, match=r"^SEEDRL_ENV_KWARGS must be JSON \(got difficulty=2\)$"):
        loaded("Env-v0")


def test_the_task_is_the_id_without_its_module() -> None:
    assert loaded("my.module:ALE/Pong-v5").task == "ALE/Pong-v5"
    assert loaded("CartPole-v1").task == "CartPole-v1"


def test_the_actors_id_tells_host_and_process() -> None:
    assert loaded("Env-v0").actor_id.rpartition("-")[2].isdigit()
    assert loaded("Env-v0", "--actor-id", "me").actor_id == "me"


@pytest.mark.parametrize(
    "url", ["127.0.0.1:50051", "inference:1", "[::1]:50051", "unix:/tmp/s", "a.b-c:65535"]
)
def test_an_address_is_accepted(url: str) -> None:
    assert loaded("Env-v0", "--inference-url", url).inference_url == url


@pytest.mark.parametrize(
    "url", ["", "host", "host:", "host:0", "host:65536", "http://host:1", "a b:1", "::1:5"]
)
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--inference-url: must be host:port or unix:/path"):
        loaded("Env-v0", "--inference-url", url)


@pytest.mark.parametrize("env", ["", ":Env-v0", "module:"])
def test_what_is_no_environment_is_one_line(env: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^ENV: must be a Gymnasium id or module:id"):
        loaded(env)
