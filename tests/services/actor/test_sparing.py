"""Which of many alike events are logged."""

from structlog.testing import capture_logs

from services.actor.sparing import SparingLog
from shared.telemetry import get_logger


def test_the_first_events_are_logged_then_one_now_and_then_that_counts_the_others() -> None:
    now = 100.0
    with capture_logs() as logs:
        sparing = SparingLog(get_logger(), first=2, seconds=10, clock=lambda: now)
        for second in range(25):
            now = 100.0 + second
            sparing.error("crashed", second=second)
    assert [(event["second"], event.get("unlogged", 0)) for event in logs] == [
        (0, 0),
        (1, 0),
        (11, 9),
        (21, 9),
    ]
