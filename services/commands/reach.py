"""How a command reaches a run: by its directory, or by NATS URL and run id."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import SecretStr

from services.commands.config import ControlConfig, StatusConfig
from services.local.connection import read_connection
from shared.bus.connection import Bus, connected_bus
from shared.config import NatsSettings
from shared.errors import ConnectionFailed, RunError


@asynccontextmanager
async def reached_run(config: StatusConfig | ControlConfig, *, name: str) -> AsyncIterator[Bus]:
    """A connection, called `name`, to the NATS server of the run that `config` names.

    Raises RunError when none goes on there, or when its directory and other settings name different runs;
    ConnectionFailed.
    """
    settings, run_id = _named(config)
    try:
        async with connected_bus(settings, run_id=run_id, name=name, patient=False) as bus:
            yield bus
    except ConnectionFailed as error:
        if config.run_dir is None and "nats_url" not in config.model_fields_set:
            raise ConnectionFailed(f"{error}; for a local run, give its directory") from error
        raise


def _named(config: StatusConfig | ControlConfig) -> tuple[NatsSettings, str]:
    if config.run_dir is None:
        return NatsSettings.of(config), config.run_id
    connection = read_connection(config.run_dir)
    for name in sorted(config.model_fields_set & {"run_id", "nats_url"}):
        if getattr(config, name) != getattr(connection, name):
            raise RunError(
                f"{config.run_dir} and {name} name different runs; "
                "give the directory of a local run, or nats_url and run_id"
            )
    token = connection.nats_token
    settings = NatsSettings.of(
        config, nats_url=connection.nats_url, nats_token=SecretStr(token) if token else None
    )
    return settings, connection.run_id
