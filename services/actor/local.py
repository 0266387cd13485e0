"""What a group offers to an inference service on the same host, and what of it that one took."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

from services.actor.config import ActorConfig
from shared.specs import EnvironmentSpec
from shared.types import Array
from shared.wire import inference_pb2 as pb
from shared.wire.pipes import OfferedPipes, Pipes
from shared.wire.shared_memory import SharedObservation


class LocalOffer:
    """Memory for a stream's observations and pipes for its messages, until `close`."""

    def __init__(
        self, spec: EnvironmentSpec, *, group_size: int, stream_id: str, is_wanted: bool = True
    ) -> None:
        """Offers what there is to be had, or nothing if that is not wanted."""
        self.leaves: Sequence[Array] | None = None  # [B, …] where observations are to be left
        self.pipes: Pipes | None = None  # where messages are to go
        self._memory: SharedObservation | None = None
        self._pipes: OfferedPipes | None = None
        if is_wanted:
            with suppress(OSError):
                self._memory = SharedObservation(spec, group_size=group_size, stream_id=stream_id)
                self._pipes = OfferedPipes()

    @property
    def message(self) -> pb.SharedMemory | None:
        """What a Hello says of it."""
        if self._memory is None:
            return None
        message = pb.SharedMemory()
        message.CopyFrom(self._memory.offer)
        if self._pipes is not None:
            message.requests_fd, message.answers_fd = self._pipes.requests, self._pipes.answers
        return message

    def settle(self, welcome: pb.Welcome) -> None:
        """Inference has answered: what it took is there to be used, the rest is let go."""
        if self._memory is not None and welcome.shared_memory:
            self.leaves = self._memory.leaves
        if self._pipes is not None and welcome.pipes:
            self.pipes = self._pipes.mine
        self._withdraw()

    def close(self) -> None:
        """Lets go of everything."""
        self._withdraw()
        if self.pipes is not None:
            self.pipes.close()

    def _withdraw(self) -> None:
        if self._memory is not None:
            self._memory.close()  # before the pipes: see `taken`
        if self._pipes is not None:
            self._pipes.close()
            if self.pipes is None:
                self._pipes.mine.close()
        self._memory = self._pipes = None


@contextmanager
def offered(config: ActorConfig, spec: EnvironmentSpec, *, stream_id: str) -> Iterator[LocalOffer]:
    """What an actor with this configuration offers for a stream, as long as the context lasts."""
    offer = LocalOffer(
        spec, group_size=config.group_size, stream_id=stream_id, is_wanted=config.shared_memory
    )
    with closing(offer):
        yield offer
