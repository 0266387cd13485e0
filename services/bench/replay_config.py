"""Configuration of `seedrl bench replay`."""

from pydantic import AliasChoices, Field

from shared.config import SequenceSettings, Settings
from shared.wire.limits import MAX_GROUP_SIZE


class ReplayBenchConfig(Settings, SequenceSettings):
    """Measures how fast sequences come into replay and out of it, and what they cost in memory.

    Real chunks of an environment, played at random, go through NATS and a replay service: inserts while
    nobody samples, then samples while nobody inserts, then new priorities. The same chunks then go into the
    table alone, in this process, without NATS and without being taken apart. The recurrent states are random,
    so that nothing of them compresses.

    Examples:  seedrl bench replay
               seedrl bench replay --env ALE/MsPacman-v5 --batch-size 32 --json
    """

    env: str = "ALE/Pong-v5"
    """Environment: a Gymnasium id, or module:id for one that your own module registers."""
    group_size: int = Field(32, ge=1, le=MAX_GROUP_SIZE)
    """Environments of the group that is recorded."""
    unroll: int = Field(40, ge=1)
    """Steps of a trajectory chunk (T)."""
    frame_stack: int = Field(4, ge=1, le=64)
    """Frames the policy would see at once: a chunk holds those before its first."""
    lstm_size: int = Field(512, ge=0)
    """Units of the LSTM core, whose state is stored with every chunk; 0: none."""
    batch_size: int = Field(64, ge=1)
    """Sequences of a sample, and priorities of an update."""
    replay_capacity: int = Field(20_000, ge=1, lt=2**32)
    """Sequences that replay holds; the oldest make room."""
    windows: int = Field(5, ge=1)
    """Windows of each measurement; their medians count."""
    window_seconds: float = Field(2.0, gt=0)
    """Seconds of each window."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json"))
    """Print one line of JSON."""

    @property
    def chunks_per_item(self) -> int:
        """Consecutive chunks that hold burn_in + sequence_length steps."""
        return -(-(self.burn_in + self.sequence_length) // self.unroll)
