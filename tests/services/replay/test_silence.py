"""When a stream of which nothing comes has ended."""

from services.replay.feeding import Silence


def test_a_stream_may_be_silent_for_several_times_as_long_as_the_slowest_one_was() -> None:
    silence = Silence(least=600.0)
    silence.heard("quick", 0.0)
    silence.heard("quick", 5.0)
    assert silence.seconds == 600.0
    silence.heard("slow", 5.0)
    silence.heard("slow", 705.0)
    assert silence.seconds == 2800.0
    silence.heard("slow", 706.0)
    assert silence.seconds == 2800.0


def test_streams_that_ended_are_not_remembered_for_ever() -> None:
    silence = Silence(least=600.0, remembered=3600.0)
    silence.heard("ended", 0.0)
    silence.heard("other", 3601.0)
    silence.heard("ended", 3602.0)
    assert silence.seconds == 600.0
