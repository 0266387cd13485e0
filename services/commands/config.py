"""Configuration of the commands that are no services."""

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg, CliSuppress

from shared.config import NatsSettings, RunSettings, Settings
from shared.kinds import Count, Device, Seed, Unused
from shared.subjects import ControlVerb
from shared.wire.limits import MAX_GROUP_SIZE


class EvalConfig(Settings):
    """Plays episodes with a checkpoint of a run, greedily, through a real inference service.

    Prints mean, median and deviation of the raw returns.

    Examples:  seedrl eval runs/pong-20260101-120000-4e1d --episodes 30
               seedrl eval runs/pong-20260101-120000-4e1d/checkpoints/checkpoint-000000012000
    """

    run_dir: CliPositionalArg[Path]
    """Directory of a run, whose newest checkpoint is played; or one of its checkpoints."""
    preset: Annotated[CliSuppress[str | None], Unused("the run's own settings are played")] = None
    """The run's own settings are played."""
    episodes: Count = 30
    """Episodes to play; every environment plays its share, so short episodes are not favoured."""
    environments: int = Field(16, ge=1, le=MAX_GROUP_SIZE)
    """Environments played at the same time, at most."""
    seed: Seed | None = None
    """Seed of the environments; default: a fresh one."""
    device: Device = "auto"
    """cpu, cuda, cuda:N; auto: cuda where there is one."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json", "as-json"))
    """Print one line of JSON with every return."""
    timeout: float = Field(3600.0, gt=0)
    """Seconds after which the command ends, with the figures of the episodes that ended and exit status 2."""


class StatusConfig(Settings, NatsSettings, RunSettings):
    """Says what every service of a run does and waits for.

    Examples:  seedrl status runs/pong-20260101-120000-4e1d
               seedrl status --nats-url nats://host:4222 --run-id my-run
    """

    run_dir: CliPositionalArg[Path | None] = None
    """Directory of a local run; or say --nats-url and --run-id."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json", "as-json"))
    """Print the statuses as one line of JSON."""


class ControlConfig(Settings, NatsSettings, RunSettings):
    """Tells a run to pause, resume, checkpoint, stop or say its status; prints what was done.

    Examples:  seedrl control pause runs/pong-20260101-120000-4e1d
               seedrl control checkpoint --nats-url nats://host:4222 --run-id my-run
    """

    verb: CliPositionalArg[ControlVerb]
    """pause: withhold actions; resume; checkpoint: save now; stop: save and end; status."""
    run_dir: CliPositionalArg[Path | None] = None
    """Directory of a local run; or say --nats-url and --run-id."""
