from services.actor.group import Backoff


def test_waits_grow_to_two_seconds_and_begin_anew_after_a_success() -> None:
    backoff = Backoff()
    waits = [backoff.seconds() for _ in range(8)]
    for wait, most in zip(waits, (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0), strict=True):
        assert most / 2 <= wait <= most
    backoff.reset()
    assert backoff.seconds() <= 0.1


def test_actors_that_lost_inference_together_do_not_come_back_together() -> None:
    assert len({Backoff().seconds() for _ in range(50)}) > 40
