"""summary.json: what a finished run did, from the learner's accounts and the queue's own numbers."""

import os
from pathlib import Path
from typing import Any

import orjson

from services.learner.accounts import load_accounts, summary
from services.local.config import TrainConfig
from shared.bus.work_queue import QueueState

SUMMARY_FILE = "summary.json"
_ATARI_FRAME_SKIP = 4


def frame_skip(config: TrainConfig) -> int:
    """Emulator frames per environment step, as far as it can be told from the environment's id."""
    default = _ATARI_FRAME_SKIP if config.env.startswith("ALE/") else 1
    skip = config.env_kwargs.get("frameskip", default)
    return skip if isinstance(skip, int) else default


def write_summary(
    config: TrainConfig, *, queue: QueueState, seconds: float, discarded_steps: int, exit_reason: str
) -> dict[str, Any]:
    """Writes summary.json and returns its content. A resumed run's seconds and discarded steps add up."""
    path = config.directory / SUMMARY_FILE
    before = read_summary(path) if config.resume else {}
    seconds += float(before.get("seconds", 0.0))
    known = summary(load_accounts(config.directory), queue)
    content = {
        **known,
        "frames": known["steps"] * frame_skip(config),
        "seconds": round(seconds, 3),
        "steps_per_second": round(known["steps"] / seconds, 1) if seconds > 0 else 0.0,
        "discarded_steps": discarded_steps + int(before.get("discarded_steps", 0)),
        "exit_reason": exit_reason,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    os.replace(temporary, path)
    return content


def read_summary(path: Path) -> dict[str, Any]:
    """What an earlier part of the run left; empty when it left nothing."""
    return dict(orjson.loads(path.read_bytes())) if path.is_file() else {}
