"""TLS to NATS: whom to believe, and what to show."""

import logging
import ssl

from shared.certificates import check_readable, trusting
from shared.config import NatsSettings
from shared.errors import ConfigurationError

_NOISE = "returning true from eof_received() has no effect when using ssl"


def _is_no_noise(record: logging.LogRecord) -> bool:
    """False for what asyncio says whenever a TLS connection of nats-py ends: it does no harm."""
    return record.msg != _NOISE


def client_context(settings: NatsSettings) -> ssl.SSLContext | None:
    """How to speak TLS to the server of `settings`; None: not at all. Raises ConfigurationError."""
    if settings.nats_ca is None:
        return None
    logging.getLogger("asyncio").addFilter(_is_no_noise)  # a second time it changes nothing
    context = trusting("nats_ca", settings.nats_ca)
    if settings.nats_cert is not None and settings.nats_key is not None:
        check_readable("nats_cert", settings.nats_cert)
        check_readable("nats_key", settings.nats_key)
        try:
            context.load_cert_chain(settings.nats_cert, settings.nats_key)
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"nats_cert, nats_key: {settings.nats_cert} and {settings.nats_key} are "
                f"no PEM certificate and its key"
            ) from error
    return context
