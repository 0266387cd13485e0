"""How far the stages of `seedrl bench pipeline` agree with `ingredients.py`: both measured in turns."""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, Field
from pydantic_settings import CliSuppress

from benchmarks.ingredients import Ingredient, ingredients, microseconds
from services.bench.alone import StageAlone, stage_alone
from services.bench.config import PipelineConfig
from services.bench.stages import STAGES
from services.cli import known_settings
from services.local.config import CONFIG_FILE, write_config
from shared.errors import ConfigurationError, SeedrlError
from shared.kinds import Count, Unused
from shared.memory import keep_freed_memory
from shared.networks.precision import resolve_device
from shared.runtime import run_command

_NO_PIPELINE = Unused("the pipeline does not run; leave it out")


class AgreementConfig(PipelineConfig):
    """Measures how far the stages of `seedrl bench pipeline` agree with `ingredients.py`, both in turns.

    Prints one line of JSON: per stage the median CPU µs per step of both, and the median of the rounds'
    ratios. Where there is a GPU, it wants --device cpu: `ingredients.py` computes on the CPU. It knows
    ALE/Pong-v5 and V-trace without an LSTM alone.

    Example:  python -m benchmarks.agreement --preset atari_vtrace_deep
    """

    windows: Count = 18
    """Rounds; figures are medians of theirs."""
    stage_seconds: float = Field(1.5, gt=0, le=2)
    """Seconds for which either is measured in each round."""
    window_seconds: Annotated[CliSuppress[float], _NO_PIPELINE] = 9.0
    """Of the pipeline, which does not run."""
    warm_up_seconds: Annotated[CliSuppress[float], _NO_PIPELINE] = 20.0
    """Of the pipeline, which does not run."""
    as_json: CliSuppress[bool] = Field(True, validation_alias=AliasChoices("json"))
    """It prints nothing else."""


async def agreement(config: PipelineConfig) -> dict[str, dict[str, float]]:
    """`bench`, `ingredients` and `ratio` of each stage. Raises SeedrlError."""
    mine = ingredients(config.network, group=config.group_size, length=config.unroll, batch=config.batch_size)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="seedrl-agreement-") as name:
        training = config.training.model_copy(update={"run_dir": Path(name), "run_id": "agreement"})
        write_config(training, training.directory / CONFIG_FILE)
        for stage in STAGES:
            microseconds(mine[stage], seconds=config.stage_seconds)  # warms up
            async with stage_alone(stage, config, training) as theirs:
                rounds = [await _round(theirs, mine[stage], config) for _ in range(config.windows)]
            bench, own = (median(values) for values in zip(*rounds, strict=True))
            ratio = median(each / other for each, other in rounds)
            figures[stage] = {
                "bench": round(bench, 1),
                "ingredients": round(own, 1),
                "ratio": round(ratio, 3),
            }
    return figures


async def _round(theirs: StageAlone, mine: Ingredient, config: PipelineConfig) -> tuple[float, float]:
    turn = await theirs.turn(())
    return 1e6 * turn.cost_seconds / turn.steps, microseconds(mine, seconds=config.stage_seconds)


def main() -> int:
    """Prints the figures; returns the exit status."""
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        config: Any = AgreementConfig.loaded(
            sys.argv[1:], prog="python -m benchmarks.agreement", known=known_settings()
        )
        if config.env != "ALE/Pong-v5" or config.agent != "vtrace" or config.lstm_size:
            raise ConfigurationError("ingredients.py knows ALE/Pong-v5 and V-trace without an LSTM alone")
        if resolve_device(config.device).type != "cpu":
            raise ConfigurationError("ingredients.py computes on the CPU: give --device cpu")
        print(json.dumps(run_command(agreement(config))))
    except SeedrlError as error:
        print(f"agreement: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
