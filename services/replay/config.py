"""Configuration of the replay service."""

from pathlib import Path

from pydantic import Field

from shared.config import AgentSettings, NatsSettings, SequenceSettings, ServiceSettings, Settings


class ReplayConfig(Settings, ServiceSettings, NatsSettings, AgentSettings, SequenceSettings):
    """Stores the trajectories of an R2D2 run and samples sequences of them by priority."""

    run_dir: Path | None = None
    """Directory of the run, for snapshots; default: runs/RUN_ID."""
    replay_capacity: int = Field(100_000, ge=1)
    """Sequences that replay holds; the oldest go first."""
    replay_max_bytes: int = Field(0, ge=0)
    """Bytes that replay holds at most; 0: no limit."""
    min_replay_size: int = Field(5000, ge=1)
    """Sequences that replay holds before it gives the first."""
    replay_ratio: float = Field(0.75, gt=0)
    """Sequences sampled per sequence inserted."""
    priority_exponent: float = Field(0.9, ge=0)
    """α: a sequence is sampled in proportion to its priority to this power."""
    rate_limiter_error_buffer: float = Field(0.0, ge=0)
    """By how much sampled sequences may differ from --replay-ratio times inserted ones; 0: the least."""
    snapshot_seconds: float = Field(600.0, gt=0)
    """Seconds between snapshots."""
