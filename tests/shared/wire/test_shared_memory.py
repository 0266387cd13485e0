import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.shared_memory import SharedObservation, taken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")

IMAGE = LeafSpec(name="image", dtype="uint8", shape=(5, 3), low=(0.0,), high=(255.0,))
SPEED = LeafSpec(name="speed", dtype="float32", shape=(), low=(0.0,), high=(1.0,))
ENVIRONMENT = EnvironmentSpec(observation=(IMAGE, SPEED), num_actions=2)
ROWS = 7


@pytest.fixture
def memory() -> Iterator[SharedObservation]:
    memory = SharedObservation(ENVIRONMENT, group_size=ROWS, stream_id="s1")
    yield memory
    memory.close()


def test_what_is_written_on_one_side_is_read_on_the_other(memory: SharedObservation) -> None:
    leaves = taken(memory.offer, ENVIRONMENT, group_size=ROWS, stream_id="s1")
    assert leaves is not None
    memory.leaves[0][...] = np.arange(ROWS * 15, dtype=np.uint8).reshape(ROWS, 5, 3)
    memory.leaves[1][...] = np.linspace(0, 1, ROWS)
    for mine, theirs, leaf in zip(memory.leaves, leaves, ENVIRONMENT.observation, strict=True):
        np.testing.assert_array_equal(theirs, mine)
        assert theirs.shape == (ROWS, *leaf.shape)
        assert theirs.ctypes.data % 64 == 0
        with pytest.raises(ValueError, match="read-only"):
            theirs[...] = 0


def test_what_was_taken_stays_when_the_offer_ends() -> None:
    memory = SharedObservation(ENVIRONMENT, group_size=ROWS, stream_id="s1")
    leaves = taken(memory.offer, ENVIRONMENT, group_size=ROWS, stream_id="s1")
    memory.close()
    assert leaves is not None
    memory.leaves[1][...] = 0.5
    assert (leaves[1] == 0.5).all()
    assert taken(memory.offer, ENVIRONMENT, group_size=ROWS, stream_id="s1") is None


def test_another_process_reaches_it_and_it_is_gone_with_its_holders() -> None:
    script = (
        "import sys; from tests.shared.wire.test_shared_memory import *\n"
        "memory = SharedObservation(ENVIRONMENT, group_size=ROWS, stream_id='s1')\n"
        "memory.leaves[0][...] = 9\n"
        "print(memory.offer.pid, memory.offer.fd, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid, descriptor = map(int, process.stdout.readline().split())
        offer = pb.SharedMemory(pid=pid, fd=descriptor)
        leaves = taken(offer, ENVIRONMENT, group_size=ROWS, stream_id="s1")
        assert leaves is not None
        process.kill()
    assert (leaves[0] == 9).all()
    assert taken(offer, ENVIRONMENT, group_size=ROWS, stream_id="s1") is None


@pytest.mark.parametrize(
    ("stream_id", "rows"), [("s2", ROWS), ("s1", ROWS + 20)], ids=["another stream", "another size"]
)
def test_what_was_not_offered_for_this_stream_is_not_taken(
    memory: SharedObservation, stream_id: str, rows: int
) -> None:
    assert taken(memory.offer, ENVIRONMENT, group_size=rows, stream_id=stream_id) is None


def test_nothing_but_a_sealed_memfd_is_taken() -> None:
    def offered(descriptor: int) -> object:
        offer = pb.SharedMemory(pid=os.getpid(), fd=descriptor)
        return taken(offer, ENVIRONMENT, group_size=ROWS, stream_id="s1")

    unsealed = os.memfd_create("seedrl-s1", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    reading, writing = os.pipe()  # opening its like would wait for ever
    try:
        os.ftruncate(unsealed, 128 + 64)
        assert offered(unsealed) is None
        fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        assert offered(unsealed) is not None
        assert offered(reading) is None
        assert offered(2**31) is None
    finally:
        for descriptor in (unsealed, reading, writing):
            os.close(descriptor)
    assert taken(pb.SharedMemory(), ENVIRONMENT, group_size=ROWS, stream_id="s1") is None
