"""Configuration of the actor service."""

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg

from shared.config import InferenceAccess, ServiceSettings, Settings
from shared.kinds import Heading, Seed

_ADDRESS = re.compile(r"unix:.+|(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5})")


def default_actor_id() -> str:
    """Host and process: unique among the actors of a run, the same over reconnections."""
    return f"{socket.gethostname()[:100]}-{os.getpid()}"


class ActorConfig(Settings, ServiceSettings, InferenceAccess):
    """Steps environments: sends observations to an inference service and takes actions from it.

    Holds no policy and needs no GPU and no NATS; start as many as you like, end them when you like.

    Examples:  seedrl actor CartPole-v1 --inference-url inference:50051
               seedrl actor ALE/Pong-v5 --groups 3 --group-size 32 --life-loss
               seedrl actor my_package:MyEnv-v0 --vectorization async --env-kwargs '{"difficulty": 2}'
    """

    heading = Heading.ENVIRONMENTS

    env: CliPositionalArg[str]
    """Environment: a Gymnasium id, envpool:id, or module:id for one that your own module registers."""
    inference_url: str = "127.0.0.1:50051"
    """Address of the inference service, host:port (or unix:/path)."""
    tls_ca: Annotated[Path | None, Heading.ACCESS] = None
    """PEM file with the certificates that vouch for inference's; with it, inference is spoken to over TLS."""
    actor_id: str = Field(default_factory=default_actor_id, min_length=1, max_length=128)
    """Name of this actor in logs and statistics; default: host and process id."""
    role: Literal["train", "eval"] = "train"
    """train: the policy explores and its steps are trained on; eval: it acts greedily."""

    groups: int = Field(2, ge=1, le=1024)
    """Groups of environments; while one waits for its actions, another one steps."""
    group_size: int = Field(16, ge=1, le=65536)
    """Environments of a group, stepped in lockstep."""
    vectorization: Literal["auto", "native", "sync", "async"] = "auto"
    """native: the environment's own vector version; sync: one after the other; async: one process each;
    auto: native if there is one, else sync."""
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for the environment, as JSON; they win over all defaults."""
    life_loss: bool = False
    """Atari: a lost life terminates learning's episode; the game goes on, and returns count to its end."""
    env_threads: int = Field(0, ge=0, le=1024)
    """Threads of one group's native Atari or envpool environments; 0: one per CPU."""
    step_threads: int = Field(1, ge=1, le=64)
    """Groups that may step at the same time; each always steps in the same thread."""
    step_timeout: float = Field(60.0, gt=0)
    """Seconds a group may take for one step before the actor ends with an error; waiting for actions does
    not count."""
    shared_memory: bool = True
    """Leave observations in shared memory and messages in pipes for an inference service that can reach both,
    one on the same Linux host and as the same user; to any other they go over gRPC."""
    seed: Annotated[Seed | None, Heading.RUN] = None
    """Seed of the environments, together with actor id and group; default: a fresh one."""

    @field_validator("inference_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        match = _ADDRESS.fullmatch(value)
        if match is None or (match["port"] is not None and not 0 < int(match["port"]) < 65536):
            raise ValueError("must be host:port or unix:/path")
        return value

    @field_validator("env")
    @classmethod
    def _names_an_environment(cls, value: str) -> str:
        module, colon, env_id = value.rpartition(":")
        if not env_id or (colon and not module):
            raise ValueError("must be a Gymnasium id or module:id")
        return value

    @property
    def task(self) -> str:
        """The environment's id without the module that registers it."""
        return self.env.rpartition(":")[2]
