"""What an R2D2 learner has to do with replay beside taking samples: counts and snapshots."""

import asyncio

from services.learner.replay_counts import replay_counts
from services.learner.report import Report
from services.learner.sampling import Replay
from shared.errors import Refused
from shared.telemetry import get_logger

_LOOK_SECONDS = 0.5

log = get_logger(__name__)


class ReplayLink:
    """The run's replay, as the learner sees it."""

    def __init__(self, replay: Replay, report: Report) -> None:
        self.replay = replay
        self._report = report

    async def follow(self) -> None:
        """Keeps the accounts up to date with what replay says of its messages, for ever.

        The steps of a run are those that were inserted into replay, which publishes its counts each second.
        """
        while True:
            counts = replay_counts(self._report.board.newest("replay"))
            if counts is not None:
                self._report.replay = counts
                self._report.accounts.mirror(counts)
                self._report.has_chunks = self._report.has_chunks or counts.steps > 0
            await asyncio.sleep(_LOOK_SECONDS)

    async def snapshot(self, updates: int, *, within: float) -> str:
        """Lets replay write the snapshot that goes with the checkpoint of `updates`; says so in words.

        The checkpoint stands by itself: where replay is away for `within` seconds, or cannot write, there is
        only a warning.
        """
        name = f"update-{updates}"
        try:
            async with asyncio.timeout(within):
                written = await self.replay.snapshot(name)
        except TimeoutError:
            log.warning("replay wrote no snapshot in time", snapshot=name, seconds=round(within, 3))
            return f"replay wrote no snapshot in {within:.3g} s"
        except Refused as refused:
            log.warning("replay wrote no snapshot", snapshot=name, reason=str(refused))
            return f"replay wrote no snapshot ({refused})"
        self._report.replay_snapshot = name
        return f"replay's snapshot {name} holds {written.get('items', '?')} sequences"
