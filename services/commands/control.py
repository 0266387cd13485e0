"""`seedrl control`: tells the services of a run what to do and prints what they did."""

import sys

import orjson

from services.commands.config import ControlConfig
from services.commands.reach import reached_run
from shared.bus.control import request_control
from shared.errors import RunError
from shared.runtime import run_command

ANSWER_SECONDS = 30.0  # a checkpoint of a large network takes a while


def control(config: ControlConfig) -> int:
    """Sends the verb and prints each service's answer; the exit status of the first that failed, or else 0.

    Raises RunError when none answers.
    """
    return run_command(_control(config))


async def _control(config: ControlConfig) -> int:
    async with reached_run(config, name="control") as bus:
        answers = await request_control(bus, config.verb, timeout=ANSWER_SECONDS)
    if not answers:
        raise RunError(f"no service of run {bus.run_id} took {config.verb!r}")
    for answer in answers:
        done = answer["done"] if "done" in answer else orjson.dumps(answer["status"]).decode()
        line = f"{answer['service']} {answer['id']}: {done}"
        if "failed" in answer:
            print(f"seedrl: {line}", file=sys.stderr)
        else:
            print(line)
    return next((int(answer["failed"]) for answer in answers if "failed" in answer), 0)
