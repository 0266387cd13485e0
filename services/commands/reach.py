"""How a command reaches a run: by its directory, or by NATS URL and run id."""

from pydantic import SecretStr

from services.commands.config import ControlConfig, StatusConfig
from services.local.connection import read_connection
from shared.config import NatsSettings


def reached_run(config: StatusConfig | ControlConfig) -> tuple[NatsSettings, str]:
    """NATS settings and run id of the run that `config` names. Raises RunError when none goes on there."""
    if config.run_dir is None:
        return NatsSettings.of(config), config.run_id
    connection = read_connection(config.run_dir)
    token = connection.nats_token
    settings = NatsSettings.of(
        config, nats_url=connection.nats_url, nats_token=SecretStr(token) if token else None
    )
    return settings, connection.run_id
