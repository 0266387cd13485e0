import sys
from pathlib import Path

import pytest

from services.learner.processor import Processor


def test_the_processor_is_busy_for_the_share_of_the_ticks_that_are_not_idle(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 70 10 0 0 0 99 99\ncpu0 1 2 3\n")
    processor = Processor(stat)
    assert processor.busy is None
    processor.sample()
    assert processor.busy is None, "no tick has passed"
    stat.write_text("cpu  40 0 20 120 20 0 0 0 99 99\ncpu0 1 2 3\n")
    processor.sample()
    assert processor.busy == 0.4
    stat.unlink()
    processor.sample()
    assert processor.busy == 0.4


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel says it on Linux alone")
def test_how_busy_this_machines_processor_is_can_be_told() -> None:
    processor = Processor()
    while processor.busy is None:
        processor.sample()
    assert 0.0 <= processor.busy <= 1.0
