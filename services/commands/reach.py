"""How a command reaches a run: by its directory, or by NATS URL and run id."""

from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from services.local.connection import read_connection
from shared.config import NatsSettings


class Reaching(Protocol):
    """The settings of a command that talks to a run."""

    run_dir: Path | None
    run_id: str
    nats_url: str
    nats_token: SecretStr | None
    connect_timeout: float


def reached_run(config: Reaching) -> tuple[NatsSettings, str]:
    """NATS settings and run id of the run that `config` names. Raises RunError when none goes on there."""
    if config.run_dir is None:
        settings = NatsSettings(
            nats_url=config.nats_url, nats_token=config.nats_token, connect_timeout=config.connect_timeout
        )
        return settings, config.run_id
    connection = read_connection(config.run_dir)
    token = connection.nats_token
    settings = NatsSettings(
        nats_url=connection.nats_url,
        nats_token=SecretStr(token) if token else None,
        connect_timeout=config.connect_timeout,
    )
    return settings, connection.run_id
