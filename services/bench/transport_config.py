"""Configuration of `seedrl bench transport`."""

import math
from typing import Annotated, Self

from pydantic import AliasChoices, Field, model_validator

from shared.config import Settings
from shared.kinds import Device
from shared.wire.limits import MAX_GROUP_SIZE, MAX_MESSAGE_BYTES, STEP_BYTES_BESIDE_OBSERVATION


class TransportConfig(Settings):
    """Measures how fast observations and actions travel between actors and inference, and chunks onwards.

    Everything is real and runs on this machine: an inference service, NATS, gRPC, chunk assembly, compression
    and the work queue. Only the policy costs nothing, and recorded frames of Pong take the environments'
    place. A row is one environment's step; the latency is that of a group's Step, from sending it until its
    actions are there. CPU seconds are told beside, since anything else that runs falsifies the rest.

    Examples:  seedrl bench transport
               seedrl bench transport --no-shared-memory
               seedrl bench transport --observation 210,160,3 --group-size 16 --streams 4 --json
    """

    observation: tuple[Annotated[int, Field(ge=1)], ...] = Field((84, 84), min_length=1, max_length=8)
    """Shape of one environment's observation, of bytes; other shapes get Pong's bytes cut or repeated."""
    group_size: int = Field(64, ge=1, le=MAX_GROUP_SIZE)
    """Environments of a group, which share a stream."""
    streams: int = Field(2, ge=1, le=64)
    """Groups; two of them share a process that sends for them."""
    shared_memory: bool = True
    """Use shared memory and pipes, as actors on inference's host do; else everything goes over gRPC."""
    device: Device = "auto"
    """Where inference holds frames and policy: cpu, cuda, cuda:N, or auto: cuda where there is one."""
    seconds: float = Field(10.0, gt=0)
    """Seconds that are measured."""
    warm_up: float = Field(3.0, ge=0)
    """Seconds before that."""
    as_json: bool = Field(False, validation_alias=AliasChoices("json"))
    """Print one line of JSON."""

    @property
    def step_bytes(self) -> int:
        """What a group's Step carries."""
        return self.group_size * (math.prod(self.observation) + STEP_BYTES_BESIDE_OBSERVATION)

    @model_validator(mode="after")
    def _a_step_fits_a_message(self) -> Self:
        if self.step_bytes > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"--observation {self.observation} × --group-size {self.group_size}: a Step has "
                f"{self.step_bytes} bytes, a message at most {MAX_MESSAGE_BYTES}"
            )
        return self
