"""Compares seedrl with Sample Factory on Atari Pong: `python benchmarks/peers.py --help`."""

import importlib
import sys
from pathlib import Path


def main() -> int:
    """Runs the command of `benchmarks.peer_comparison`; the exit status."""
    # Started as a file, Python has benchmarks/ on its path and not the directory above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        cli = importlib.import_module("benchmarks.peer_comparison.cli")
    except ModuleNotFoundError as error:
        print(
            f"peers: there is no module {error.name}; start it with the Python of `make setup`",
            file=sys.stderr,
        )
        return 2
    return int(cli.main())


if __name__ == "__main__":
    sys.exit(main())
