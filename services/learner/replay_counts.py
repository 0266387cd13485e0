"""What the replay service says of itself, as far as the learner counts it; pure."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class ReplayCounts(NamedTuple):
    """Replay's counts since the run began, from its status."""

    steps: int  # environment steps in all chunks inserted and refused
    inserted: int  # messages
    refused: dict[str, int]  # messages by reason
    redelivered: int
    items: int  # sequences in the table now
    inserted_items: int  # sequences inserted so far


def replay_counts(status: Mapping[str, Any]) -> ReplayCounts | None:
    """The counts in replay's `status`; None while it does not say any."""
    chunks = status.get("chunks")
    if not isinstance(chunks, Mapping):
        return None
    refused = chunks.get("refused_by_reason") or {}
    return ReplayCounts(
        steps=int(status.get("steps") or 0),
        inserted=int(chunks.get("inserted") or chunks.get("trained") or 0),
        refused={str(reason): int(count) for reason, count in refused.items()},
        redelivered=int(chunks.get("redelivered") or 0),
        items=int(status.get("items") or 0),
        inserted_items=int(status.get("inserted_items") or 0),
    )
