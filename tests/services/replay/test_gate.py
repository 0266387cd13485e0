from services.replay.gate import Waits


def test_the_time_of_several_who_wait_at_once_counts_once() -> None:
    now = 0.0
    waits = Waits(lambda: now)
    with waits.waiting():
        now = 2.0
        with waits.waiting():
            now = 3.0
            assert waits.is_blocked
            assert waits.seconds == 3.0, "what goes on counts, too"
        now = 5.0
    now = 9.0
    assert not waits.is_blocked
    assert (waits.seconds, waits.ended) == (5.0, 5.0)
    with waits.waiting():
        now = 10.0
    assert waits.seconds == 6.0
