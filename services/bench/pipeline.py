"""`seedrl bench pipeline`: the stages alone, then all together, in one run; the ratio is the efficiency."""

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from services.bench.config import PipelineConfig
from services.bench.interruption import uninterrupted
from services.bench.measuring import Measurement, measured
from services.bench.stages import STAGES, Stage
from services.local.config import CONFIG_FILE, TrainConfig, write_config
from services.local.process import clean_environment
from services.parent_death import ending_with_this_process
from shared.errors import RunError
from shared.networks.precision import resolve_device
from shared.telemetry import configure_logging

_STAGE_SECONDS = 300.0  # beside its windows: torch, environments and the first, slow, batches


def pipeline(config: PipelineConfig) -> int:
    """Measures and prints; returns the exit status."""
    configure_logging("warning", config.log_format, "bench")
    with tempfile.TemporaryDirectory(prefix="seedrl-bench-", ignore_cleanup_errors=True) as name:
        training = config.training.model_copy(update={"run_dir": Path(name), "run_id": "bench"})
        write_config(training, training.directory / CONFIG_FILE)
        figures = uninterrupted(_measured(config, training))
    if config.as_json:
        print(orjson.dumps(figures).decode())
    else:
        Console().print(_table(figures))
    return 0


async def _measured(config: PipelineConfig, training: TrainConfig) -> dict[str, Any]:
    before = await _stages(config, training)
    together = await measured(config, training)
    after = await _stages(config, training)
    costs = {stage: median([before[stage], after[stage]]) for stage in STAGES}
    return _figures(config, costs, together)


def bound(costs: dict[Stage, float], *, cores: int, on_cpu: bool) -> float:
    """Steps per second that no arrangement can exceed.

    On a CPU all stages share the cores. Beside an accelerator, which inference and learning share, the cores
    only step environments: the slower side decides.
    """
    if on_cpu:
        return cores / sum(costs.values())
    return min(cores / costs["env"], 1 / (costs["inference"] + costs["learner"]))


async def _stages(config: PipelineConfig, training: TrainConfig) -> dict[Stage, float]:
    """Seconds per step of every stage, one after the other."""
    return {stage: await _stage(stage, config, training) for stage in STAGES}


async def _stage(stage: Stage, config: PipelineConfig, training: TrainConfig) -> float:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.bench.stages", stage),
        *("--preset", str(training.directory / CONFIG_FILE), "--env", config.env),
        *("--windows", str(config.windows), "--stage-seconds", str(config.stage_seconds)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
        start_new_session=True,  # Ctrl-C is answered by this process alone
        preexec_fn=ending_with_this_process(),
    )
    seconds = _STAGE_SECONDS + 2 * config.windows * config.stage_seconds
    try:
        async with asyncio.timeout(seconds):
            output, errors = await process.communicate()
    except TimeoutError as error:
        raise RunError(f"stage {stage} alone did not come to an end in {seconds:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        words = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"stage {stage} alone failed: {words.removeprefix('seedrl: ')}")
    return float(orjson.loads(output)["seconds_per_step"])


def _figures(config: PipelineConfig, costs: dict[Stage, float], together: Measurement) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    device = resolve_device(config.device).type
    most = bound(costs, cores=cores, on_cpu=device == "cpu")
    return {
        "env": config.env,
        "preset": config.preset,
        "network": config.network,
        "device": device,
        "cores": cores,
        **{f"{stage}_seconds_per_step": costs[stage] for stage in STAGES},
        "bound_steps_per_second": most,
        "steps_per_second": together.steps_per_second,
        "efficiency": together.steps_per_second / most,
        "waiting": together.waiting,
        "cpu_seconds_per_step": together.cpu_seconds_per_step,
        "windows": together.windows,
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table("", "", title=f"{figures['env']} on {figures['cores']} cores, {figures['device']}")

    def microseconds(value: float) -> str:
        return f"{1e6 * value:,.0f} µs per step"

    for stage in STAGES:
        table.add_row(f"{stage} alone", microseconds(figures[f"{stage}_seconds_per_step"]))
    table.add_row("bound", f"{figures['bound_steps_per_second']:,.0f} steps/s")
    table.add_row("together", f"{figures['steps_per_second']:,.0f} steps/s")
    table.add_row("efficiency", f"{figures['efficiency']:.3f}")
    for service, share in figures["waiting"].items():
        table.add_row(f"{service} waited", f"{100 * share:.0f} % of the time")
    for service, seconds in figures["cpu_seconds_per_step"].items():
        table.add_row(f"{service} in the pipeline", microseconds(seconds))
    return table
