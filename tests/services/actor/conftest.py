import pytest

from shared import addresses


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    return addresses.free_port()
