"""The learner's configuration."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from services.learner.config import LearnerConfig
from shared.config import load
from shared.errors import ConfigurationError


def loaded(*arguments: str) -> LearnerConfig:
    return load(LearnerConfig, arguments, prog="seedrl learner")


def test_the_defaults_are_those_of_impala_on_atari() -> None:
    config = loaded()
    assert (config.optimizer, config.learning_rate, config.rmsprop_epsilon) == ("rmsprop", 6e-4, 0.01)
    assert (config.loss_reduction, config.max_gradient_norm) == ("sum", 40.0)
    assert (config.entropy_cost, config.baseline_cost, config.discount) == (0.01, 0.5, 0.99)


def test_a_seed_fits_whatever_takes_it() -> None:
    largest = 2**63 - 1
    torch.Generator().manual_seed(largest)
    np.random.default_rng([largest, largest, largest])
    assert orjson.loads(orjson.dumps(loaded("--seed", str(largest)).seed)) == largest
    for seed in (-1, largest + 1, 2**70):
        with pytest.raises(ConfigurationError, match=r"^--seed: "):
            loaded(f"--seed={seed}")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_a_device_is_accepted_without_looking_for_it(device: str) -> None:
    assert loaded("--device", device).device == device


@pytest.mark.parametrize("device", ["tpu", "", "cuda:", "cuda:x", "cpu:0", "cuda:12345678901234567890"])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--device: must be auto, cpu, cuda or cuda:N"):
        loaded("--device", device)


def test_a_sum_of_more_rewards_than_a_sequence_has_steps_is_refused() -> None:
    words = ("--agent", "r2d2", "--sequence-length", "20")
    assert loaded(*words, "--n-steps", "20").n_steps == 20
    with pytest.raises(ConfigurationError, match=r"n_steps \(21\) must not exceed sequence_length \(20\)"):
        loaded(*words, "--n-steps", "21")


def test_every_hyperparameter_has_a_readable_flag() -> None:
    config = loaded("--trace-lambda", "0.9", "--max-pg-rho=2", "--loss-reduction", "mean", "--resume")
    assert (config.trace_lambda, config.max_pg_rho, config.loss_reduction) == (0.9, 2.0, "mean")
    assert config.resume


def test_the_run_directory_is_named_after_the_run_unless_it_is_given() -> None:
    assert loaded("--run-id", "pong").directory == Path("runs/pong")
    assert loaded("--run-dir", "elsewhere").directory == Path("elsewhere")


@pytest.mark.parametrize("batches", ["-1", "1", "2"])
def test_a_queue_that_could_not_hold_more_than_the_learner_does_is_refused(batches: str) -> None:
    with pytest.raises(
        ConfigurationError, match="--max-queued-batches: must be at least 3: the learner holds"
    ):
        loaded(f"--max-queued-batches={batches}")
    assert loaded("--max-queued-batches", "3").max_queued_batches == 3


@pytest.mark.parametrize(
    "argument",
    ["--discount=1.5", "--learning-rate=0", "--optimizer=sgd", "--max-policy-lag=0", "--entropy-cost=-1"],
)
def test_a_bad_value_is_refused_by_its_flag(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=argument.partition("=")[0]):
        loaded(argument)


def test_a_batch_that_cannot_be_dealt_out_equally_is_refused() -> None:
    assert loaded("--batch-size", "32", "--minibatches", "4").minibatches == 4
    with pytest.raises(
        ConfigurationError, match=r"batch_size \(30\) must be a multiple of minibatches \(4\)"
    ):
        loaded("--batch-size", "30", "--minibatches", "4")
