"""Fixtures of all tests."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from services.nats_server import NatsServer, embedded_nats
from tests.support.nats import NatsRun, OwnNats

# Tests start servers while gRPC runs in this process; its fork handlers would stumble in the child.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Before torch is imported: its OpenMP threads spin while they wait, at the cost of the tests beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; no limit on the time of one, which a busy machine would exceed.
settings.register_profile("seedrl", deadline=None, derandomize=True)
settings.load_profile("seedrl")


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One real nats-server for all tests, with a token and JetStream."""
    # A loop of its own, so that the server outlives the tests' loops.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        server = embedded_nats(tmp_path_factory.mktemp("nats"))
        yield runner.run(server.__aenter__())
        runner.run(server.__aexit__(None, None, None))


@pytest.fixture
def nats(nats_server: NatsServer) -> NatsRun:
    """A run that nobody else uses, on the common server: `url`, `token`, `run_id`, `settings`, `bus()`."""
    return NatsRun(nats_server.url, nats_server.token, f"test-{secrets.token_hex(4)}")


@pytest.fixture
async def own_nats(tmp_path: Path) -> AsyncIterator[OwnNats]:
    """A running server that the test may stop, kill, freeze and start again."""
    own = OwnNats(tmp_path / "nats")
    await own.start()
    yield own
    await own.stop()
