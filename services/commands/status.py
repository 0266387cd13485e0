"""`seedrl status`: what every service of a run does and waits for."""

from collections.abc import Iterable
from typing import Any

import orjson
from rich.console import Console

from services.commands.config import StatusConfig
from services.commands.reach import reached_run
from services.local.display import bottleneck, doing, services_table
from shared.bus.control import request_control
from shared.errors import RunError
from shared.runtime import run_command

ANSWER_SECONDS = 2.0


def status(config: StatusConfig) -> int:
    """Asks every service of the run for its status and prints it. Raises RunError when none answers."""
    run_id, answers = run_command(_answers(config))
    if config.as_json:
        print(orjson.dumps(answers).decode())
        return 0
    found = [(str(answer["service"]), str(answer["id"]), answer["status"]) for answer in answers]
    found += [("actor", name, actor) for *_, says in found for name, actor in _actors(says)]
    rows = [
        {"service": f"{service} {name}", "doing": doing(service, says)}
        for service, name, says in sorted(found, key=lambda row: row[:2])
    ]
    console = Console(markup=False, highlight=False)
    console.print(services_table(rows, title=f"run {run_id}"))
    learners = [says for service, _, says in found if service == "learner"]
    words = bottleneck(learners[0], figures=True) if learners else f"no learner of run {run_id} answers"
    if words:
        console.print(words, soft_wrap=True)
    return 0


def _actors(status: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """The actors that an inference service sees; they have no connection to NATS themselves."""
    actors = status.get("actors")
    return actors.items() if isinstance(actors, dict) else ()


async def _answers(config: StatusConfig) -> tuple[str, list[dict[str, Any]]]:
    async with reached_run(config, name="status") as bus:
        answers = await request_control(bus, "status", timeout=ANSWER_SECONDS)
    if not answers:
        raise RunError(f"no service of run {bus.run_id} answers")
    return bus.run_id, answers
