"""Configuration of the replay service."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from services.replay.limiter import smallest_error_buffer
from shared.config import AgentSettings, NatsSettings, SequenceSettings, ServiceSettings, Settings
from shared.kinds import R2D2, Count, Heading, Seed


class ReplayConfig(Settings, ServiceSettings, NatsSettings, AgentSettings, SequenceSettings):
    """Stores the trajectories of an R2D2 run and gives its learner sequences of them by priority.

    Starts in any order with the other services: it waits for NATS and for the run's spec (which the first
    actor's environment decides). Takes what inference publishes from the work queue, and withholds either
    side so that --replay-ratio sequences are sampled for each that is inserted. Snapshots of all it holds,
    on a timer, with the learner's checkpoints and on SIGTERM, are restored at the next start. One replay per
    run: a second one is refused. Give it the preset that inference and learner have.

    Examples:  seedrl replay --run-id pong --run-dir runs/pong --preset atari_r2d2
               seedrl replay --run-id pole --agent r2d2 --replay-capacity 5000 --min-replay-size 200
    """

    heading = Heading.RUN

    run_dir: Path | None = None
    """Directory of the run, for snapshots and accounts (in replay/); default: runs/RUN_ID."""
    seed: Seed | None = None
    """Seed of the sequences that are drawn; default: a different one each time."""
    replay_capacity: Annotated[int, R2D2] = Field(100_000, ge=1, le=2**26)
    """Sequences that replay holds; the oldest make room."""
    replay_max_bytes: Annotated[int, R2D2] = Field(0, ge=0, lt=2**63)
    """Bytes of trajectories that replay holds at most; the oldest make room; 0: no limit."""
    min_replay_size: Annotated[Count, R2D2] = 5000
    """Sequences that replay holds before it gives the first."""
    replay_ratio: Annotated[float, R2D2] = Field(0.75, gt=0)
    """Sequences sampled per sequence inserted."""
    priority_exponent: Annotated[float, R2D2] = Field(0.9, ge=0, le=1)
    """α: a sequence is sampled in proportion to its priority to this power; 0: all alike."""
    rate_limiter_error_buffer: Annotated[float, R2D2] = Field(0.0, ge=0)
    """By how many sequences what was sampled may be ahead of or behind --replay-ratio times what was
    inserted: at least twice --batch-size and twice --replay-ratio times a message's rows; 0: just that."""
    snapshot_seconds: Annotated[float, R2D2] = Field(600.0, gt=0)
    """Seconds between snapshots; what is inserted after the newest one is lost in a crash, and counted."""
    keep_snapshots: Annotated[Count, R2D2] = 2
    """Newest snapshots that are kept; should one be damaged, the one before it is restored."""

    @property
    def replay_dir(self) -> Path:
        """Where snapshots and accounts are."""
        run_dir = self.run_dir if self.run_dir is not None else Path("runs") / self.run_id
        return run_dir / "replay"

    @property
    def chunks_per_item(self) -> int:
        """Consecutive chunks that hold burn_in + sequence_length steps."""
        return -(-(self.burn_in + self.sequence_length) // self.unroll)

    def least_error_buffer(self, rows: int) -> float:
        """The smallest error buffer with which messages of `rows` rows and batches go past each other."""
        return smallest_error_buffer(
            samples_per_insert=self.replay_ratio, rows_per_chunk=rows, batch_size=self.batch_size
        )

    @model_validator(mode="after")
    def _sampling_can_begin(self) -> Self:
        if self.min_replay_size > self.replay_capacity and self.agent == "r2d2":
            raise ValueError(
                f"min_replay_size ({self.min_replay_size}) must not exceed "
                f"replay_capacity ({self.replay_capacity})"
            )
        least = self.least_error_buffer(1)
        if 0 < self.rate_limiter_error_buffer < least:
            raise ValueError(
                f"rate_limiter_error_buffer ({self.rate_limiter_error_buffer:g}) must be at least {least:g} "
                f"(twice --batch-size, twice --replay-ratio), or 0"
            )
        return self
