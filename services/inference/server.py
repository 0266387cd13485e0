"""The gRPC server: its address, its limits, and the services beside Act (health, reflection)."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # set by an if
from grpc_reflection.v1alpha import reflection

from services.inference.servicer import InferenceServicer
from services.inference.session import FRAMING_BYTES
from services.inference.tls import TlsFront
from shared.addresses import free_port, joined
from shared.errors import ConfigurationError
from shared.telemetry import get_logger
from shared.wire import inference_pb2 as pb
from shared.wire.limits import MAX_MESSAGE_BYTES

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name

_END_SECONDS = 1.0  # for calls to take notice of their status

OPTIONS = (
    # No limit of gRPC's own, which would end the stream without a word here: the servicer refuses what is too
    # large, and counts it.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + FRAMING_BYTES),
    # An actor's machine that vanished without a word is noticed after 10 + 10 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Actors ping every 10 s; who pings more often than every 5 s is told to go away.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Otherwise a second service could bind the same port and take half of the actors.
    ("grpc.so_reuseport", 0),
)

log = get_logger(__name__)


class Health:
    """What grpc.health.v1 says of the server as a whole and of the Inference service."""

    def __init__(self) -> None:
        self.servicer = health.HealthServicer()
        self._serving: bool | None = None

    async def set(self, *, serving: bool) -> None:
        """Tells those who ask or watch."""
        if serving == self._serving:
            return
        self._serving = serving
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE_NAME):
            await self.servicer.set(name, status)


@asynccontextmanager
async def serving_actors(
    host: str,
    port: int,
    servicer: InferenceServicer,
    health_: Health,
    front: TlsFront | None = None,
) -> AsyncIterator[int]:
    """Listens on `host`:`port` (0: a free one) and yields the port; on leaving, every call is over.

    `front` listens there in the server's place and speaks TLS. Raises ConfigurationError when the address
    cannot be listened on.
    """
    free_port(host, port)
    address = joined(host, port) if front is None else f"unix:{front.backend}"
    server = grpc.aio.server(options=OPTIONS)
    act = grpc.stream_stream_rpc_method_handler(servicer.act)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Act": act}),))
    health_pb2_grpc.add_HealthServicer_to_server(health_.servicer, server)  # type: ignore[no-untyped-call]
    names = (
        SERVICE_NAME,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigurationError(f"grpc: cannot listen on {address}") from error
    await server.start()
    async with AsyncExitStack() as stack:
        if front is not None:
            bound = await stack.enter_async_context(front.listening(host, port))
        log.info("grpc", address=joined(host, bound), tls=front is not None)
        try:
            yield bound
        finally:
            await health_.servicer.enter_graceful_shutdown()
            await server.stop(_END_SECONDS)
