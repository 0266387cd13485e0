"""How a command reaches a run: by its directory, or by NATS URL and run id."""

from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from services.local.run import read_connection
from shared.config import NatsSettings
from shared.errors import RunError


class Reaching(Protocol):
    """The settings of a command that talks to a run."""

    run_dir: Path | None
    run_id: str
    nats_url: str
    nats_token: SecretStr | None
    connect_timeout: float


def reached_run(config: Reaching) -> tuple[NatsSettings, str]:
    """NATS settings and run id of the run that `config` names. Raises RunError for what is no local run."""
    if config.run_dir is None:
        settings = NatsSettings(
            nats_url=config.nats_url, nats_token=config.nats_token, connect_timeout=config.connect_timeout
        )
        return settings, config.run_id
    connection = read_connection(config.run_dir)
    if connection is None:
        raise RunError(f"{config.run_dir} is no local run's directory")
    token = connection["nats_token"]
    settings = NatsSettings(
        nats_url=str(connection["nats_url"]),
        nats_token=SecretStr(str(token)) if token else None,
        connect_timeout=config.connect_timeout,
    )
    return settings, str(connection["run_id"])
