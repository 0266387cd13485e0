"""Configuration of the inference service."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.config import (
    AgentSettings,
    DeviceSettings,
    InferenceAccess,
    NatsSettings,
    ServiceSettings,
    Settings,
)
from shared.kinds import MAX_SLOTS, Heading, Seed


class InferenceConfig(
    Settings, ServiceSettings, NatsSettings, InferenceAccess, AgentSettings, DeviceSettings
):
    """Holds the policy: answers actors' observations with actions, cuts trajectories, follows the weights.

    Examples:  seedrl inference --nats-url nats://nats:4222 --host 0.0.0.0
               SEEDRL_NATS_TOKEN=… seedrl inference --run-id pong --device cuda --max-batch-size 512
    """

    heading = Heading.INFERENCE

    host: str = "127.0.0.1"
    """Address the gRPC server binds to."""
    port: int = Field(50051, ge=0, le=65535)
    """Port of the gRPC server; 0 takes a free one and logs it."""
    tls_cert: Annotated[Path | None, Heading.ACCESS] = None
    """PEM file with the gRPC server's certificate chain; with --tls-key, actors are served over TLS only."""
    tls_key: Annotated[Path | None, Heading.ACCESS] = None
    """PEM file with the key of --tls-cert."""
    max_batch_size: int = Field(256, ge=1, le=MAX_SLOTS)
    """Rows (environments) after which a batch leaves; a larger group goes alone."""
    max_batch_delay: float = Field(0.002, ge=0)
    """Seconds after which a batch leaves even though streams that owe an observation are still awaited."""
    max_environments: int = Field(4096, ge=1, le=MAX_SLOTS)
    """Environments that may be connected at once, over all streams."""
    step_timeout: float = Field(60.0, gt=0)
    """Seconds an actor may take for a step before its stream is ended; its waiting does not count."""
    cuda_graphs: bool = False
    """On a CUDA device, launch the network's kernels as one CUDA graph for each number of rows."""
    seed: Annotated[Seed | None, Heading.RUN] = None
    """Seed of the sampled actions; default: a fresh one."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        return self

    @model_validator(mode="after")
    def _cuda_graphs_want_cuda(self) -> Self:
        if self.cuda_graphs and self.device == "cpu":
            raise ValueError("cuda_graphs: there are none on device cpu")
        return self
