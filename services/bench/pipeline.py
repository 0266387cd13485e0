"""`seedrl bench pipeline`: the stages alone and all together, in turns; the ratio is the efficiency."""

import os
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from services.bench.alone import stage_alone
from services.bench.config import PipelineConfig
from services.bench.measuring import Measurement, measured
from services.bench.stages import STAGES, Stage
from services.local.config import CONFIG_FILE, TrainConfig, write_config
from shared.networks.precision import resolve_device
from shared.runtime import run_command
from shared.telemetry import configure_logging


def pipeline(config: PipelineConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", config.log_format, "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as name:
        training = config.training.model_copy(update={"run_dir": Path(name), "run_id": "bench"})
        write_config(training, training.directory / CONFIG_FILE)
        figures = run_command(_measured(config, training))
    if config.as_json:
        print(orjson.dumps(figures).decode())
    else:
        Console().print(_table(figures))
    return 0


async def _measured(config: PipelineConfig, training: TrainConfig) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        alone = {
            stage: await stack.enter_async_context(stage_alone(stage, config, training)) for stage in STAGES
        }
        most = partial(bound, cores=_cores(), on_cpu=_device(config) == "cpu")
        return _figures(config, await measured(config, training, alone, most))


def bound(costs: dict[Stage, float], *, cores: int, on_cpu: bool) -> float:
    """Steps per second that no arrangement can exceed.

    On a CPU all stages share the cores. Beside an accelerator, which inference and learning share, the cores
    only step environments: the slower side decides.
    """
    if on_cpu:
        return cores / sum(costs.values())
    return min(cores / costs["env"], 1 / (costs["inference"] + costs["learner"]))


def _figures(config: PipelineConfig, together: Measurement) -> dict[str, Any]:
    return {
        "env": config.env,
        "preset": config.preset,
        "network": config.network,
        "device": _device(config),
        "cores": _cores(),
        **{f"{stage}_seconds_per_step": together.alone[stage] for stage in STAGES},
        "bound_steps_per_second": together.bound,
        "steps_per_second": together.steps_per_second,
        "efficiency": together.efficiency,
        "waiting": together.waiting,
        "cpu_seconds_per_step": together.cpu_seconds_per_step,
        "windows": together.windows,
        "efficiencies": together.efficiencies,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _device(config: PipelineConfig) -> str:
    return resolve_device(config.device).type


def _table(figures: dict[str, Any]) -> Table:
    table = Table("", "", title=f"{figures['env']} on {figures['cores']} cores, {figures['device']}")

    def microseconds(value: float) -> str:
        return f"{1e6 * value:,.0f} µs per step"

    for stage in STAGES:
        table.add_row(f"{stage} alone", microseconds(figures[f"{stage}_seconds_per_step"]))
    table.add_row("bound", f"{figures['bound_steps_per_second']:,.0f} steps/s")
    table.add_row("together", f"{figures['steps_per_second']:,.0f} steps/s")
    least, most = min(figures["efficiencies"]), max(figures["efficiencies"])
    table.add_row("efficiency", f"{figures['efficiency']:.3f}, of single windows {least:.2f} to {most:.2f}")
    for service, share in figures["waiting"].items():
        table.add_row(f"{service} waited", f"{100 * share:.0f} % of the time")
    for service, seconds in figures["cpu_seconds_per_step"].items():
        table.add_row(f"{service} in the pipeline", microseconds(seconds))
    return table
