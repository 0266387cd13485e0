"""When a stream of which nothing comes has ended."""

from services.replay.silence import Silence


def test_a_stream_may_be_silent_for_several_times_as_long_as_the_slowest_one_was() -> None:
    silence = Silence(0.0, least=600.0)
    silence.heard("quick", 0.0)
    silence.heard("quick", 5.0)
    assert silence.seconds == 600.0
    silence.heard("slow", 5.0)
    silence.heard("slow", 705.0)
    assert silence.seconds == 2800.0
    silence.heard("slow", 706.0)
    assert silence.seconds == 2800.0


def test_streams_that_ended_are_not_remembered_for_ever() -> None:
    silence = Silence(0.0, least=600.0, remembered=3600.0)
    silence.heard("ended", 0.0)
    silence.heard("other", 3601.0)
    silence.heard("ended", 3602.0)
    assert silence.seconds == 600.0


def heard(silence: Silence, *, begin: float, end: float) -> None:
    """A stream of which something comes every ten seconds."""
    for number in range(int(end - begin) // 10 + 1):
        silence.heard("live", begin + 10 * number)


def test_a_stream_has_ended_when_only_others_are_heard_for_long() -> None:
    silence = Silence(0.0, least=600.0)
    heard(silence, begin=0.0, end=600.0)
    assert silence.ended_before(600.0) is None
    heard(silence, begin=610.0, end=610.0)
    assert silence.ended_before(610.0) == 10.0


def test_no_stream_ends_while_none_can_be_heard() -> None:
    silence = Silence(0.0, least=600.0)
    heard(silence, begin=0.0, end=700.0)
    heard(silence, begin=1500.0, end=2000.0)  # the run was paused in between
    silence.seconds = 600.0
    assert silence.ended_before(2000.0) is None
    heard(silence, begin=2010.0, end=2110.0)
    assert silence.ended_before(2110.0) == 1510.0
    silence.deaf(2400.0)  # a chunk waited until its insert was let through
    assert silence.ended_before(2900.0) is None
