"""summary.json: what a finished run did, from the learner's accounts and the queue's own numbers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from services.learner.accounts import Accounts, load_accounts, summary
from services.learner.replay_counts import ReplayCounts
from services.local.config import TrainConfig, is_atari, write_file
from services.local.reading import reading
from services.replay.accounts import load_accounts as load_replay_accounts
from shared.bus.connection import Bus
from shared.bus.work_queue import QueueState, queue_state, still_queued
from shared.errors import RunError
from shared.telemetry import get_logger

SUMMARY_FILE = "summary.json"
_ATARI_FRAME_SKIP = 4

log = get_logger(__name__)


def frame_skip(env: str, env_kwargs: Mapping[str, Any]) -> int | None:
    """Emulator frames per environment step, 1 where the id is not Atari's; None where that is a range."""
    if not is_atari(env):
        return 1
    skip = env_kwargs.get("frameskip", _ATARI_FRAME_SKIP)
    return skip if isinstance(skip, int) else None


async def untrained_queue(bus: Bus, config: TrainConfig) -> QueueState:
    """The queue, without what the learner or replay took but could not acknowledge before its end."""
    state, replay = await queue_state(bus), load_replay_accounts(config.replay_dir)
    pending = {*load_accounts(config.directory).pending, *(replay.pending if replay is not None else ())}
    taken = await still_queued(bus, pending)
    return replace(state, messages=state.messages - len(taken))


def replay_at_last(config: TrainConfig) -> ReplayCounts | None:
    """What replay's journal says, which is newer than its last status; None where there is none."""
    accounts = load_replay_accounts(config.replay_dir)
    return (
        None
        if accounts is None
        else ReplayCounts(
            steps=accounts.steps,
            inserted=accounts.inserted,
            refused=dict(accounts.refused),
            redelivered=accounts.redelivered,
            items=0,
            inserted_items=accounts.inserted_items,
        )
    )


def write_summary(
    config: TrainConfig,
    *,
    queue: QueueState | None,
    discarded_steps: int | None,
    exit_reason: str,
    replay: ReplayCounts | None = None,
) -> dict[str, Any]:
    """Writes summary.json and returns its content.

    queue: None when NATS did not say; what was published and is queued is then null. The seconds are those
    of training, which the accounts count over all parts of a run; discarded_steps must be of all, too, and
    is None when inference did not say.
    replay: the counts of an R2D2 run's replay; `trained` chunks are then those that it inserted.
    """
    accounts = load_accounts(config.directory)
    skip = frame_skip(config.env, config.env_kwargs)
    if replay is not None:
        accounts.mirror(replay)
    if queue is not None:  # NATS may have lost its store meanwhile
        accounts.recognize_queue(queue)
    known = summary(accounts, queue or QueueState(0, 0))
    if queue is None:
        known["chunks"] |= {"published": None, "queued": None}
    content = {
        **known,
        "frames": accounts.steps * skip if skip is not None else None,
        "seconds": round(accounts.seconds, 3),
        "steps_per_second": round(accounts.steps / accounts.seconds, 1) if accounts.seconds else 0.0,
        "discarded_steps": discarded_steps,
        "exit_reason": exit_reason,
        **(_of_r2d2(accounts, replay) if config.agent == "r2d2" else {}),
    }
    save_summary(config, content)
    return content


def save_summary(config: TrainConfig, content: dict[str, Any]) -> None:
    """Writes summary.json whole. Raises RunError when it cannot be written."""
    write_file(config.directory / SUMMARY_FILE, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def _of_r2d2(accounts: Accounts, replay: ReplayCounts | None) -> dict[str, Any]:
    """`eval_return` is known after the run's end."""
    inserted = replay.inserted_items if replay is not None else 0
    return {
        "sequences": accounts.sequences,
        "samples_per_insert": accounts.sequences / inserted if inserted else None,
        "eval_return": None,
        "eval_episodes": 0,
    }


def discarded_before(config: TrainConfig) -> int | None:
    """Steps discarded in the earlier parts of a resumed run; None: not known, since one of them was killed.

    Nor is it where the summary is damaged.
    """
    if not config.resume:
        return 0
    said = _said(config)
    return int(said["discarded_steps"]) if said is not None and said["discarded_steps"] is not None else None


def forget_discarded(config: TrainConfig) -> None:
    """To be called when a resumed run begins: if it is killed, nobody knows what it discarded."""
    if config.resume and (said := _said(config)) is not None:
        save_summary(config, {**said, "discarded_steps": None})


def _said(config: TrainConfig) -> dict[str, Any] | None:
    """The summary of the parts before; None where there is none that can be read."""
    path = config.directory / SUMMARY_FILE
    if not path.is_file():
        return None
    try:
        with reading(path):
            said: dict[str, Any] = orjson.loads(path.read_bytes())
            return {**said, "discarded_steps": said["discarded_steps"] and int(said["discarded_steps"])}
    except RunError as error:
        log.warning("it is not known what the run discarded before", reason=str(error))
        return None
