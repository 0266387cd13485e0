import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.files import replace_file


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Files take `size` bytes: as on a disk that gets full, a write takes a part first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "accounts.json"
    replace_file(path, b"old", durable=durable)
    with disk_with_room_for(1000), pytest.raises(OSError, match="too large"):
        replace_file(path, b"new" * 1000, durable=durable)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"new" * 1000, durable=durable)
    assert path.read_bytes() == b"new" * 1000
