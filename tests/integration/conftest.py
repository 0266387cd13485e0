from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.single_services import SingleServices, single_services


@pytest.fixture
def services(tmp_path: Path) -> Iterator[SingleServices]:
    """Services of one run, each started by the test as a process of its own; all ended after it."""
    with single_services(tmp_path) as started:
        yield started
