"""Draws the learning curve of finished or running runs as an SVG: mean return of 100 episodes over steps.

python benchmarks/curve.py runs/pong [runs/other …] > docs/results/pong.svg
"""

import contextlib
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.local.config import CONFIG_FILE
from services.local.summary import frame_skip

TAG = "episodes/mean_return_100"
WIDTH, HEIGHT, MARGIN = 720, 360, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")

Points = list[tuple[float, float]]  # (environment steps, mean return)


def curve(run_dir: Path) -> Points:
    """The points of a run, in order. Raises SystemExit when there are none."""
    if not (run_dir / "tensorboard").is_dir():
        raise SystemExit(f"curve: {run_dir} is no run directory: it holds no tensorboard logs")
    events: Any = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 500})  # type: ignore[no-untyped-call]
    events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise SystemExit(f"curve: {run_dir} has no finished episodes in {run_dir / 'tensorboard'}")
    points = [(float(event.step), float(event.value)) for event in events.Scalars(TAG)]
    return sorted(points)


def frames_per_step(run_dir: Path) -> int:
    """Emulator frames per environment step of a run; 1 where its configuration says no number."""
    with contextlib.suppress(OSError):
        values = yaml.safe_load((run_dir / CONFIG_FILE).read_text())
        return frame_skip(values["env"], values["env_kwargs"]) or 1
    return 1


def svg(curves: dict[str, Points], *, frames: int = 1) -> str:
    """One line per curve, with its name, in a frame with the extremes at its axes; `frames` of each step."""
    steps = max(x for points in curves.values() for x, _ in points)
    low = min(y for points in curves.values() for _, y in points)
    high = max(y for points in curves.values() for _, y in points)
    x_scale = (WIDTH - 2 * MARGIN) / steps
    y_scale = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)

    def place(point: tuple[float, float]) -> str:
        return f"{MARGIN + point[0] * x_scale:.1f},{HEIGHT - MARGIN - (point[1] - low) * y_scale:.1f}"

    def text(x: float, y: float, words: str, anchor: str, colour: str = "#333") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    steps_are = f"environment steps ({frames} frames each)" if frames > 1 else "environment steps"
    inner = f'width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<rect x="{MARGIN}" y="{MARGIN}" {inner} fill="none" stroke="#ccc"/>',
        text(MARGIN - 6, HEIGHT - MARGIN, f"{low:.1f}", "end"),
        text(MARGIN - 6, MARGIN + 8, f"{high:.1f}", "end"),
        text(MARGIN, HEIGHT - MARGIN + 18, "0", "middle"),
        text(WIDTH - MARGIN, HEIGHT - MARGIN + 18, f"{steps:,.0f}", "end"),
        text(WIDTH / 2, HEIGHT - 12, steps_are, "middle"),
        text(MARGIN, 20, "mean return of the last 100 training episodes", "start"),
    ]
    for index, (name, points) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(map(place, points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(text(WIDTH - MARGIN, 20 + 14 * index, name, "end", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Prints the SVG of the runs in `arguments`."""
    if not arguments or any(each.startswith("-") for each in arguments):
        raise SystemExit(__doc__)
    runs = [Path(each) for each in dict.fromkeys(arguments)]
    names = [run.name for run in runs]
    are_told_apart = all(names) and len(set(names)) == len(names)
    curves = {run.name if are_told_apart else str(run): curve(run) for run in runs}
    skips = {frames_per_step(run) for run in runs}
    print(svg(curves, frames=skips.pop() if len(skips) == 1 else 1), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
