import os
import sys

import pytest

from services.actor.local import LocalOffer
from shared.wire import inference_pb2 as pb
from tests.support.counting_group import ENVIRONMENT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


def opened(before: set[str]) -> list[str]:
    """What the descriptors are that were not there before."""
    names = set(os.listdir("/proc/self/fd")) - before
    links = [os.path.realpath(f"/proc/self/fd/{name}") for name in names]
    kinds = {"pipe:[": "pipe", "memfd:": "memory"}
    return sorted(kind for link in links for mark, kind in kinds.items() if mark in link)


@pytest.mark.parametrize(
    ("welcome", "stays"),
    [
        (pb.Welcome(), []),
        (pb.Welcome(shared_memory=True), ["memory"]),
        (pb.Welcome(shared_memory=True, pipes=True), ["memory", "pipe", "pipe"]),
    ],
)
def test_what_inference_took_stays_and_nothing_else(welcome: pb.Welcome, stays: list[str]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    offer = LocalOffer(ENVIRONMENT, group_size=3, stream_id="s1")
    message = offer.message
    assert message is not None
    assert message.requests_fd
    assert message.answers_fd
    offer.settle(welcome)
    assert opened(before) == stays
    assert (offer.leaves is not None, offer.pipes is not None) == ("memory" in stays, "pipe" in stays)
    offer.close()
    offer.close()
    del offer
    assert opened(before) == []


def test_an_offer_that_nobody_answers_leaves_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    LocalOffer(ENVIRONMENT, group_size=3, stream_id="s1").close()
    assert opened(before) == []


def test_what_is_not_wanted_is_not_offered() -> None:
    offer = LocalOffer(ENVIRONMENT, group_size=3, stream_id="s1", is_wanted=False)
    assert offer.message is None
    offer.close()
