"""Memory in which an actor leaves a group's observations for an inference service on the same host.

It is a memfd of Linux: it has no name in any file system, is gone with the last process that holds it and,
once sealed, cannot be made smaller under somebody who reads it. docs/protocol.md says how both agree on it.
"""

import fcntl
import math
import mmap
import os
import sys

import numpy as np

from shared.specs import EnvironmentSpec, LeafSpec
from shared.types import Array
from shared.wire import inference_pb2 as pb

_ALIGNMENT = 64  # bytes, of each leaf


class SharedObservation:
    """An actor's side: `leaves`, per leaf of the observation [B, …], which are written in place.

    The memory stays as long as anybody holds one of them, the offer until `close`.
    """

    def __init__(self, environment: EnvironmentSpec, *, group_size: int, stream_id: str) -> None:
        """Raises OSError when the system has no memory of this kind (any but Linux) or gives none."""
        if sys.platform != "linux":
            raise OSError("memfd_create: only Linux has it")
        size = _size(environment, group_size)
        self._descriptor = os.memfd_create(_name(stream_id), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            memory = mmap.mmap(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        self.leaves = _leaves(memory, environment, group_size)
        self.offer = pb.SharedMemory(pid=os.getpid(), fd=self._descriptor)

    def close(self) -> None:
        """Ends the offer; who took it keeps the memory."""
        os.close(self._descriptor)


def taken(
    offer: pb.SharedMemory, environment: EnvironmentSpec, *, group_size: int, stream_id: str
) -> list[Array] | None:
    """Inference's side: the leaves that are offered, [B, …], read-only; None where they cannot be reached.

    They cannot from another host, another container or as another user, nor when there is something else.
    """
    if sys.platform != "linux":
        return None
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    size = _size(environment, group_size)
    try:
        # It is known by its name before it is opened: seen from another container it may be anything.
        if not is_offered(offer, stream_id=stream_id):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if not sealed or os.fstat(descriptor).st_size != size:
                return None
            memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return _leaves(memory, environment, group_size)


def is_offered(offer: pb.SharedMemory, *, stream_id: str) -> bool:
    """Whether that process has memory of this stream there. Raises OSError if it cannot be seen."""
    return os.readlink(f"/proc/{offer.pid}/fd/{offer.fd}") == f"/memfd:{_name(stream_id)} (deleted)"


def _name(stream_id: str) -> str:
    return f"seedrl-{stream_id}"


def _size(environment: EnvironmentSpec, group_size: int) -> int:
    return sum(_room(leaf, group_size) for leaf in environment.observation)


def _room(leaf: LeafSpec, group_size: int) -> int:
    """Bytes from where the leaf begins to where the next one does."""
    return math.ceil(group_size * leaf.row_bytes / _ALIGNMENT) * _ALIGNMENT


def _leaves(memory: mmap.mmap, environment: EnvironmentSpec, group_size: int) -> list[Array]:
    leaves, offset = [], 0
    for leaf in environment.observation:
        dtype = np.dtype(leaf.dtype).newbyteorder("<")
        values = np.frombuffer(memory, dtype, count=group_size * math.prod(leaf.shape), offset=offset)
        leaves.append(values.reshape(group_size, *leaf.shape))
        offset += _room(leaf, group_size)
    return leaves
