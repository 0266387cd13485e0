"""Configuration of the benchmarks."""

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field
from pydantic_settings import CliSuppress

from services.local.config import TrainConfig
from shared.kinds import Count, Unused

_OWN_RUN = Unused("every measurement is a run of its own, in a temporary directory; leave it out")


class PipelineConfig(TrainConfig):
    """Measures how close a training comes to what this machine can do at all.

    What a step costs in stepping, in inference and in learning, each alone and in CPU seconds: C cores
    cannot do more than C / (sum of the three) steps per second. And the whole pipeline, as `seedrl train`
    runs it; the ratio of the two is the efficiency. They are measured in turns of seconds: the
    pipeline stands still while a stage is alone. Steps are decisions, not frames; reset steps are none.
    Takes six to seven minutes; anything else that runs on the machine falsifies it.

    Examples:  seedrl bench pipeline --env ALE/Pong-v5 --preset atari_vtrace
               seedrl bench pipeline --preset atari_vtrace_deep --json
               seedrl bench pipeline --agent r2d2 --preset atari_r2d2_small
    """

    env: str = "ALE/Pong-v5"
    """Environment: a Gymnasium id, envpool:id, or module:id for one that your own module registers."""
    windows: Count = 18
    """Windows; figures are medians of theirs, the efficiency that of their own ratios."""
    window_seconds: float = Field(9.0, gt=0)
    """Seconds for which the pipeline runs in each window, a third of them before each stage."""
    stage_seconds: float = Field(1.5, gt=0, le=2)
    """Seconds for which each stage is alone in each window; at most 2, which a pipeline that stands still
    survives."""
    warm_up_seconds: float = Field(20.0, ge=0)
    """Seconds between the pipeline's first update and its first window."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json"))
    """Print one line of JSON."""
    resume: Annotated[CliSuppress[bool], _OWN_RUN] = False
    """Every measurement is a run of its own, in a temporary directory."""
    run_dir: Annotated[CliSuppress[Path | None], _OWN_RUN] = None
    """Every measurement has its own."""
    run_id: Annotated[CliSuppress[str], _OWN_RUN] = "default"
    """Every measurement has its own."""
    nats_url: Annotated[CliSuppress[str | None], _OWN_RUN] = None
    """Every measurement has a server of its own, which its figures count."""
    eval_episodes: Annotated[CliSuppress[int], Unused("nothing is evaluated; leave it out")] = 0
    """Nothing is evaluated."""

    @property
    def training(self) -> TrainConfig:
        """The configuration of the run that is measured, whose logs say where its services are."""
        fields = TrainConfig.model_fields.keys() - {"preset", "nats_url"}
        values = {name: getattr(self, name) for name in fields}
        return TrainConfig.model_validate(
            {**values, "log_level": "debug" if self.log_level == "debug" else "info"}
        )
