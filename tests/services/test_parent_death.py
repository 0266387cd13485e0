"""Children do not outlive their parent, whenever it dies (see also tests/services/local/test_process.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once(tmp_path: Path) -> None:
    code = """
import os
from services.parent_death import ending_with_this_process
asks = ending_with_this_process()
if not os.fork():  # stands for whoever adopts the child
    child = os.fork()
    if not child:
        asks()
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) + 40)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.stdout == "41\n", result.stderr
