"""Under which conditions a comparison was made, as its section of the document says it."""

import os
import platform
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.peer_comparison import sample_factory, seedrl
from benchmarks.peer_comparison.measuring import Timing
from benchmarks.peer_comparison.workload import BATCH_STEPS, BATCH_TRAJECTORIES, UNROLL
from shared.presets import read_preset

_CPU_INFO = Path("/proc/cpuinfo")

_COUNTED = f"""\
The unit is the environment step, one decision of the policy that the learner trained on; with the frame
skip of 4 that both use, emulator frames are four times as many. Each figure is the difference of the
system's own counter between two moments at which it moved, by the time between them, never an average
that the system displays.

* seedrl: `steps` of the learner's `/status`, the steps in the chunks that it is done with. Reset steps,
  whose action is ignored, are none. Steps in chunks that were refused as too old are taken out by their
  share of the chunks.
* Sample Factory: `Total num frames` of its reports, every 5 s, divided by 4. Its learner adds
  {BATCH_STEPS} × 4 for every batch, which is checked (a report that is no multiple of it ends the
  comparison). Its environments reset within a step, so reset steps do not occur, and the emulator frames
  of resets are not counted. A window can be off by one update, {BATCH_STEPS} steps, at either end.

Both: Pong, 84 × 84 greyscale, 4 frames stacked; convolutions 32·8×8/4, 64·4×4/2, 64·3×3/1 and 512 dense
units; trajectories of {UNROLL} steps, {BATCH_TRAJECTORIES} of them in an update, each used once; learning
and inference on the CPU. The emulators differ: each system has the ale-py that stands in the table."""

_SEEDRL = """\
seedrl steps {groups} groups of {group_size} environments in one actor. Its row in float32 has
`--precision=float32` beside this:

```
{command}
```"""

_SAMPLE_FACTORY = """\
Sample Factory runs unpatched in a virtual environment of its own ({requirements}). Its ale-py comes without
ROMs: `ALE_PY_ROM_DIR` points it to those of this project's ale-py; `TZ=UTC` keeps the clock of its log
steady. Its thread pools are of its own default sizes, and its environments
those of the command: workers times environments per worker.

```
{command}
```"""


def cpu_model() -> str:
    """Name of the processor."""
    text = _CPU_INFO.read_text() if _CPU_INFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def conditions(*, rounds: int, timing: Timing, load_before: float, extra_flags: list[str]) -> str:
    """All that is not a figure: machine, protocol, what is counted, how the peer was run."""
    machine = (
        f"{datetime.now(UTC):%Y-%m-%d}; {cpu_model()}, {usable_cores()} cores; "
        f"load average before it {load_before:.2f}; Python {platform.python_version()}. "
        f"In turns, {rounds} {'round' if rounds == 1 else 'rounds'}, each run a fresh start: "
        f"{timing.warm_up_seconds:g} s of warming up after the first trained step, then a window of "
        f"{timing.window_seconds:g} s. Again: `python benchmarks/peers.py`."
    )
    words = (
        "python -m sf_examples.atari.train_atari",
        *map(shlex.quote, (*sample_factory.FLAGS, *extra_flags)),
    )
    peer = _SAMPLE_FACTORY.format(
        requirements=", ".join(f"`{each}`" for each in sample_factory.REQUIREMENTS),
        command=" \\\n  ".join(_wrapped(words)),
    )
    preset = read_preset(seedrl.PRESET).values
    ours = _SEEDRL.format(
        groups=preset["groups"],
        group_size=preset["group_size"],
        command=" \\\n  ".join(_wrapped(("seedrl train", *seedrl.FLAGS))),
    )
    return "\n\n".join((machine, _COUNTED, ours, peer))


def _wrapped(words: tuple[str, ...], width: int = 110) -> list[str]:
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
