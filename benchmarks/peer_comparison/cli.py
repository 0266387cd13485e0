"""The command: its options, the turns, what it prints and writes."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_comparison.conditions import conditions
from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Measured
from benchmarks.peer_comparison.measuring import Contestant, Timing, measured_window
from benchmarks.peer_comparison.processes import adopt_orphans, interrupt_on_signals
from benchmarks.peer_comparison.sample_factory import SampleFactory, install
from benchmarks.peer_comparison.section import comparison, document_with, write_between_markers
from benchmarks.peer_comparison.seedrl import Seedrl

ROOT = Path(__file__).resolve().parents[2]
_INTERRUPTED = 130

_DESCRIPTION = """\
Compares the training speed of seedrl with that of Sample Factory on Atari Pong: the same network
(Nature CNN), unroll 20, batches of 32 trajectories, everything on the CPU. They run in turns, each a
fresh start; what counts is environment steps per second (decisions, not emulator frames) that the
learner trained on. seedrl is measured as it comes, which is in bfloat16 where the CPU has the
instructions, and, there, also in float32.

The table goes into a document between two marker comments; the document is made when it is missing.
Nothing else should run on the machine meanwhile: it takes about two minutes for each contestant and
round."""

_EPILOG = """\
examples:
  python benchmarks/peers.py                                    the comparison, about 12 minutes
  python benchmarks/peers.py --rounds 1 --warm-up 5 --seconds 10 --print-only
                                                                to see that it works
  python benchmarks/peers.py --sample-factory-flags="--num_envs_per_worker=16"
                                                                other settings for Sample Factory

Sample Factory is installed once into --venv by pip (about 2 GB). Where plain pip would fetch torch
with CUDA, have PIP_EXTRA_INDEX_URL name PyTorch's CPU index."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; exit status 0, 1 when it cannot go on, 2 for a wrong option, 130 interrupted."""
    options = _parser().parse_args(arguments)
    interrupt_on_signals()
    adopt_orphans()
    try:
        text = _compared(options)
        print(text)
        if not options.print_only:
            write_between_markers(options.document, text)
            print(f"written: {options.document}")
    except ComparisonError as error:
        print(f"peers: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("peers: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _compared(options: argparse.Namespace) -> str:
    load_before = os.getloadavg()[0]
    if not options.print_only:
        document_with(options.document, "")  # rather refused now than after the comparison
    install(options.venv)
    timing = Timing(options.warm_up, options.seconds)
    peer = SampleFactory(options.venv, options.sample_factory_flags)
    contestants: list[Contestant] = [*_seedrls(), peer]
    measured = _in_turns(contestants, rounds=options.rounds, timing=timing)
    return comparison(
        measured,
        conditions=conditions(
            rounds=options.rounds,
            timing=timing,
            load_before=load_before,
            extra_flags=options.sample_factory_flags,
        ),
    )


def _seedrls() -> list[Seedrl]:
    """As it comes and, where that is another thing, in the peer's precision."""
    as_it_comes, float32 = Seedrl("auto"), Seedrl("float32")
    return [as_it_comes, float32] if as_it_comes.name != float32.name else [float32]


def _in_turns(contestants: Sequence[Contestant], *, rounds: int, timing: Timing) -> list[Measured]:
    """A, B, …, A, B, …: what the machine does besides changes with the time and so hits all alike."""
    figures: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn in range(1, rounds + 1):
        for contestant in contestants:
            speed = measured_window(contestant, timing).steps_per_second
            figures[contestant.name].append(speed)
            print(f"round {turn} of {rounds}: {contestant.name}: {speed:,.0f} steps/s", flush=True)
    return [Measured(each.name, each.settings(), tuple(figures[each.name])) for each in contestants]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_options(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=_count, default=2, metavar="N", help="turns of each contestant (default 2)")
    add(
        "--warm-up",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds after the first step (default 30)",
    )
    add("--seconds", type=_seconds, default=60.0, metavar="S", help="seconds of a window (default 60)")
    add(
        "--venv",
        type=Path,
        default=ROOT / "benchmarks/.peers-venv",
        metavar="DIR",
        help="Sample Factory's own virtual environment, made when missing (default benchmarks/.peers-venv)",
    )
    add(
        "--sample-factory-flags",
        type=_flags,
        default=[],
        metavar="FLAGS",
        help="more flags for Sample Factory, after its others; the table names them",
    )
    add(
        "--document",
        type=Path,
        default=ROOT / "docs/performance.md",
        metavar="FILE",
        help="where the table goes (default docs/performance.md)",
    )
    add("--print-only", action="store_true", help="print the section without writing it")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _flags(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of flags: {error}") from error


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value
