"""Why a message of an actor was refused, as words for the actor and a label for the metric."""

from typing import Literal, get_args

from shared.errors import ProtocolError

Reason = Literal[
    "garbage",  # no ActRequest
    "order",  # a Step where a Hello is due, or the other way round
    "hello",  # a field of the Hello
    "protocol_version",
    "run_id",
    "spaces",  # an environment that does not fit the run
    "stream_id",  # one that was there before
    "group_size",  # more environments than there may be
    "full",  # no slots left
    "backlog",  # too many chunks of ended streams wait to be published
    "row_size",  # a row or a step too large for a message
    "unavailable",  # not ready for actors, or shutting down
    "size",  # a Step longer than it can be
    "pipes",  # a piece of a message, or one out of turn
    "sequence",
    "leaves",
    "bytes",
    "flags",
    "is_first",
    "reward",
    "observation",
    "timeout",  # a Step that did not come
]
REASONS: tuple[Reason, ...] = get_args(Reason)

Status = Literal["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "OK"]


class Refusal(ProtocolError):
    """Ends one stream with a gRPC `status` and this text; `reason` labels the counter."""

    def __init__(self, reason: Reason, text: str, *, status: Status = "INVALID_ARGUMENT") -> None:
        super().__init__(text)
        self.reason: Reason = reason
        self.status: Status = status
