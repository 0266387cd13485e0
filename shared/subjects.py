"""Every NATS name of a run; nothing else in the project spells one."""

import re
from dataclasses import dataclass
from typing import Literal

from shared.errors import ConfigurationError

ControlVerb = Literal["pause", "resume", "checkpoint", "stop", "status"]

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def validated_run_id(run_id: str) -> str:
    """Returns `run_id`; raises ConfigurationError when it cannot be part of a NATS name."""
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigurationError(f"run id {run_id!r} is not 1 to 64 letters, digits, '_' or '-'")
    return run_id


@dataclass(frozen=True)
class Subjects:
    """Subjects, streams, buckets and consumers of the run `run_id`."""

    run_id: str

    def __post_init__(self) -> None:
        validated_run_id(self.run_id)

    @property
    def prefix(self) -> str:
        """What every subject of the run starts with."""
        return f"seedrl.{self.run_id}"

    @property
    def trajectories(self) -> str:
        """Subject of the chunks' work queue."""
        return f"{self.prefix}.trajectories"

    @property
    def trajectories_stream(self) -> str:
        """Stream of the chunks' work queue."""
        return f"seedrl_{self.run_id}_trajectories"

    @property
    def trajectories_consumer(self) -> str:
        """Durable consumer of the work queue."""
        return f"seedrl_{self.run_id}_trainer"

    @property
    def weights(self) -> str:
        """Wildcard over the weights' parts and their manifest."""
        return f"{self.prefix}.weights.>"

    def weights_part(self, part: int | str) -> str:
        """Subject of one part of the weights."""
        return f"{self.prefix}.weights.{part}"

    @property
    def weights_manifest(self) -> str:
        """Subject of the manifest, published after the parts it names."""
        return self.weights_part("manifest")

    @property
    def weights_stream(self) -> str:
        """Last-per-subject stream of the weights."""
        return f"seedrl_{self.run_id}_weights"

    @property
    def replay_sample(self) -> str:
        """Subject of requests for sequences."""
        return f"{self.prefix}.replay.sample"

    @property
    def replay_priorities(self) -> str:
        """Subject of new priorities."""
        return f"{self.prefix}.replay.priorities"

    @property
    def replay_snapshot(self) -> str:
        """Subject of requests for a snapshot."""
        return f"{self.prefix}.replay.snapshot"

    @property
    def episodes(self) -> str:
        """Subject of finished episodes."""
        return f"{self.prefix}.episodes"

    @property
    def episodes_stream(self) -> str:
        """Stream of finished episodes."""
        return f"seedrl_{self.run_id}_episodes"

    @property
    def episodes_consumer(self) -> str:
        """Durable consumer of finished episodes (the learner's)."""
        return f"seedrl_{self.run_id}_learner"

    def control(self, verb: str) -> str:
        """Subject of a control verb; `*` for all."""
        return f"{self.prefix}.control.{verb}"

    def status(self, service: str, service_id: str) -> str:
        """Subject on which one service says its status; `*` for all."""
        return f"{self.prefix}.status.{service}.{service_id}"

    @property
    def bucket(self) -> str:
        """Key-value bucket of what the run agreed on (the spec)."""
        return f"seedrl_{self.run_id}"

    @property
    def leases_bucket(self) -> str:
        """Key-value bucket whose entries expire: who are the run's learner and replay."""
        return f"seedrl_{self.run_id}_leases"
