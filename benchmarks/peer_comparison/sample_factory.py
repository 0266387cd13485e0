"""Sample Factory as a contestant: its own virtual environment, its Atari example, read from its log."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_comparison.errors import ComparisonError
from benchmarks.peer_comparison.figures import Reading, sample_factory_readings
from benchmarks.peer_comparison.workload import BATCH_STEPS, UNROLL

REQUIREMENTS = ("sample-factory[atari]==2.1.1", "torch==2.13.0")
_SHOWN = ("sample-factory", "torch", "ale-py", "gymnasium", "numpy")
_STAMP = ".installed"
_VERSIONS = """\
import json, sys
from importlib.metadata import version
print(json.dumps([version(name) for name in sys.argv[1:]]))"""
_LOG = Path("train/pong/sf_log.txt")

FLAGS = (
    "--algo=APPO",
    "--env=atari_pong",
    "--device=cpu",
    "--async_rl=True",
    "--num_workers=2",
    "--num_envs_per_worker=8",
    "--worker_num_splits=2",
    "--policy_workers_per_policy=1",
    "--num_epochs=1",
    "--num_batches_per_epoch=1",
    f"--rollout={UNROLL}",
    f"--batch_size={BATCH_STEPS}",
    "--train_for_env_steps=1000000000",  # so that it does not end by itself
    "--train_dir=train",
    "--experiment=pong",
    "--restart_behavior=overwrite",
)


class SampleFactory:
    """APPO with the Atari example's environment; its convnet_atari and 512 units are the Nature network."""

    name = "Sample Factory, float32"

    def __init__(self, venv: Path, extra_flags: Sequence[str] = ()) -> None:
        self._python = venv.absolute() / "bin/python"
        self._extra_flags = tuple(extra_flags)

    def command(self, directory: Path) -> list[str]:
        """The command line of a run in `directory`; of a flag given twice the later one wins."""
        del directory  # it writes below its working directory
        return [str(self._python), "-m", "sf_examples.atari.train_atari", *FLAGS, *self._extra_flags]

    def environment(self) -> dict[str, str]:
        """Its process environment: no Python path of ours; ROMs; a clock that no time zone turns back."""
        return _foreign_environment() | {"ALE_PY_ROM_DIR": str(_rom_directory()), "TZ": "UTC"}

    def reading(self, directory: Path) -> Reading | None:
        """Its newest report; None before the first one."""
        log = directory / _LOG
        text = log.read_text(errors="replace") if log.exists() else ""
        return next(reversed(sample_factory_readings(text, batch_steps=BATCH_STEPS)), None)

    def settings(self) -> str:
        """For the table."""
        command = [str(self._python), "-c", _VERSIONS, *_SHOWN]
        done = subprocess.run(command, env=_foreign_environment(), capture_output=True, text=True, check=True)
        own, *others = zip(_SHOWN, json.loads(done.stdout), strict=True)
        flags = f"; {' '.join(self._extra_flags)}" if self._extra_flags else ""
        return ", ".join([own[1], *(f"{name} {version}" for name, version in others)]) + f"; float32{flags}"


def install(venv: Path) -> None:
    """Makes the virtual environment, or completes one that was begun. Raises ComparisonError."""
    stamp, wanted = venv / _STAMP, "\n".join(REQUIREMENTS)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and (not venv.is_dir() or any(venv.iterdir())):
        raise ComparisonError(f"{venv} is no virtual environment; give another --venv, or remove it")
    print(f"installing Sample Factory into {venv} (once; some minutes)", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", str(venv)])
    _run([str(venv / "bin/python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS])
    stamp.write_text(wanted)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=_foreign_environment(), capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
        raise ComparisonError(f"{' '.join(command[:4])} … failed: {errors[0]}")


def _foreign_environment() -> dict[str, str]:
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in own} | {"PYTHONNOUSERSITE": "1"}


def _rom_directory() -> Path:
    """Sample Factory's ale-py comes without ROMs; the newer one in this environment has them."""
    spec = importlib.util.find_spec("ale_py")
    if spec is None or spec.origin is None:
        raise ComparisonError("ale-py is missing; run it with the project's environment (make setup)")
    return Path(spec.origin).parent / "roms"
