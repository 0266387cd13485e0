"""Configuration of `seedrl bench replay`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import CliSuppress

from services.replay.config import ReplayConfig
from shared.config import AgentSettings, SequenceSettings, Settings, load
from shared.kinds import Count, Size
from shared.wire.limits import MAX_GROUP_SIZE

_NEVER_BLOCKS = 1e12  # sequences by which samples and inserts may be apart


class ReplayBenchConfig(Settings, AgentSettings, SequenceSettings):
    """Measures how many sequences a second go into replay and out of it, and how many priorities change.

    Everything is real and runs on this machine: a replay service, NATS with its work queue, the learner's
    client. What is sent are chunks of an environment that was played at random, with random recurrent states
    and TD errors. Beside it the same of the table alone, in one process, without messages. Chunks and
    sequences are those of the preset, atari_r2d2 where none is named. The limiter withholds nothing.

    Examples:  seedrl bench replay
               seedrl bench replay --env ALE/MsPacman-v5 --json
               seedrl bench replay --preset atari_r2d2_small
    """

    env: str = "ALE/Pong-v5"
    """Environment: a Gymnasium id, envpool:id, or module:id for one that your own module registers."""
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment."""
    environments: int = Field(32, ge=1, le=MAX_GROUP_SIZE)
    """Environments of the group whose chunks are recorded."""
    recorded_sequences: Size = 16
    """Sequences that are recorded of each environment."""
    streams: int = Field(2, ge=1, le=64)
    """Streams, each of which sends all that was recorded in every window of inserts."""
    windows: Count = 5
    """Windows of each measurement; their medians count."""
    window_seconds: float = Field(2.0, gt=0)
    """Seconds of each window of samples and of priorities."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json"))
    """Print one line of JSON."""
    agent: CliSuppress[str] = "r2d2"  # type: ignore[assignment]
    """Only R2D2 has a replay."""

    @classmethod
    def loaded(cls, arguments: Sequence[str], *, prog: str, known: Iterable[type[Settings]]) -> Self:
        """As `load`, with a preset where none is named."""
        return load(cls, arguments, prog=prog, known=known, preset_name="atari_r2d2")

    @property
    def sequences_per_window(self) -> int:
        """Sequences that a window of inserts completes."""
        return self.streams * self.environments * self.recorded_sequences

    @property
    def chunks(self) -> int:
        """Chunks of each environment in which the recorded sequences are."""
        stride = self.sequence_length // self.unroll
        return (self.recorded_sequences - 1) * stride + -(
            -(self.burn_in + self.sequence_length) // self.unroll
        )

    def replay(self, *, run_id: str, run_dir: Path) -> ReplayConfig:
        """Of the service and the table: two windows fill it, so that the oldest sequences make room."""
        shared = {name for group in (AgentSettings, SequenceSettings) for name in group.model_fields}
        return ReplayConfig.model_validate(
            {
                **{name: getattr(self, name) for name in shared},
                "run_id": run_id,
                "run_dir": run_dir,
                "replay_capacity": max(2 * self.sequences_per_window, self.batch_size),
                "min_replay_size": 1,
                "rate_limiter_error_buffer": _NEVER_BLOCKS,
                "seed": 0,
            }
        )

    @model_validator(mode="after")
    def _is_r2d2(self) -> Self:
        if self.agent != "r2d2":
            raise ValueError(f"only r2d2 has a replay, not {self.agent}; name a preset of it")
        return self
