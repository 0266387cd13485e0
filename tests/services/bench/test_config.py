"""Configuration of `seedrl bench pipeline`."""

import pytest

from services.bench.config import PipelineConfig
from shared.errors import ConfigurationError


def loaded(*words: str) -> PipelineConfig:
    return PipelineConfig.loaded(words, prog="seedrl bench pipeline", known=())


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("--resume",), "a run of its own"),
        (("--run-dir", "x"), "a run of its own"),
        (("--run-id", "x"), "a run of its own"),
        (("--eval-episodes", "3"), "nothing is evaluated"),
        (("--http-port", "8080"), "a free port"),
    ],
)
def test_an_option_of_a_training_that_a_measurement_would_ignore_is_refused(
    words: tuple[str, ...], advice: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{words[0]} is not for seedrl bench pipeline: .*{advice}"):
        loaded(*words)


@pytest.mark.parametrize(("level", "services"), [("error", "info"), ("info", "info"), ("debug", "debug")])
def test_services_always_say_where_they_answer(level: str, services: str) -> None:
    config = PipelineConfig.model_validate({"env": "CartPole-v1", "log_level": level})
    assert config.training.log_level == services


def test_the_environment_may_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN_DIR", "RUN_ID", "EVAL_EPISODES"):
        monkeypatch.setenv(f"SEEDRL_{name}", "3")
    assert loaded("--unroll", "7").training.unroll == 7
