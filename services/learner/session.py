"""What runs in the training thread: building, restoring, training, saving; knows no asyncio and no NATS."""

from collections.abc import Mapping
from typing import Any

import torch

from services.learner.accounts import CHECKPOINTS, Accounts, has_begun
from services.learner.config import LearnerConfig
from services.learner.intake import StateLayout
from services.learner.publishing import Snapshot
from services.learner.r2d2 import R2D2Metrics, R2D2Trainer
from services.learner.training import UpdateMetrics, VTraceTrainer
from shared.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint, weights_to_bytes
from shared.errors import RunError
from shared.networks.build import build_network, check_contract
from shared.networks.precision import resolve_device
from shared.specs import RunSpec
from shared.telemetry import get_logger

log = get_logger(__name__)


def check_run_dir(config: LearnerConfig) -> None:
    """Creates the run directory. Raises RunError when it cannot, or when it holds a run without `resume`."""
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write run directory {directory}: {error.strerror}") from error
    if has_begun(directory) and not config.resume:
        raise RunError(f"{directory} holds a run; give --resume to go on with it, or another --run-dir")


class Session:
    """A trainer, restored from the newest checkpoint where there is one. For one thread alone.

    `accounts` are made to say what the weights are. `is_saved`: the newest checkpoint holds these weights.
    Raises ConfigurationError for a network that cannot be built, or one of the user's own that breaks its
    contract, and RunError for a checkpoint that is of another run or network.
    """

    def __init__(self, config: LearnerConfig, spec: RunSpec, accounts: Accounts) -> None:
        if config.seed is not None:
            torch.manual_seed(config.seed)
        self.spec = spec
        self._directory = config.directory / CHECKPOINTS
        self._keep = config.keep_checkpoints
        check_contract(spec, config.precision)
        network = build_network(spec)
        self.state_layout: StateLayout = [tuple(leaf.shape[1:]) for leaf in network.initial_state(1)]
        trainers: dict[str, type[VTraceTrainer | R2D2Trainer]] = {
            "vtrace": VTraceTrainer,
            "r2d2": R2D2Trainer,
        }
        self.trainer: VTraceTrainer | R2D2Trainer = trainers[spec.agent](
            network, config, device=resolve_device(config.device)
        )
        checkpoint = latest_checkpoint(self._directory)
        counters: Mapping[str, float] = {}
        if checkpoint is not None:
            self._restore(checkpoint)
            counters = checkpoint.counters
        accounts.restore(
            updates=int(counters.get("updates", 0)),
            effective_updates=int(counters.get("effective_updates", 0)),
            steps=int(counters.get("steps", 0)),
        )
        self.trainer.updates = accounts.updates
        self.trainer.rolled_back = accounts.rolled_back
        self.is_saved = counters.get("updates") == accounts.updates

    def train(self, batch: Any, *, steps: int) -> UpdateMetrics | R2D2Metrics:
        """One update with a batch of the trainer's kind, after `steps` steps. Raises TrainingDiverged."""
        self.is_saved = False
        return self.trainer.train(batch, steps=steps)

    def snapshot(self) -> Snapshot:
        """The weights to publish. Raises TrainingDiverged when one is not finite."""
        return Snapshot(weights_to_bytes(self.trainer.weights()), self.trainer.updates)

    def save(self, *, steps: int) -> tuple[str, int]:
        """Saves a checkpoint unless the newest one is the same; what it is called, and its update.

        Raises TrainingDiverged when a weight is not finite, and RunError when it cannot be written.
        """
        updates = self.trainer.updates
        if not self.is_saved:
            try:
                self._save(updates, steps)
            except OSError as error:
                raise RunError(f"cannot write checkpoint in {self._directory}: {error.strerror}") from error
            self.is_saved = True
        return f"checkpoint-{updates:012d}", updates

    def _save(self, updates: int, steps: int) -> None:
        save_checkpoint(
            self._directory,
            spec=self.spec,
            weights=self.trainer.weights(),
            optimizer_state=self.trainer.optimizer_state(),
            counters={
                "updates": updates,
                "effective_updates": updates - self.trainer.rolled_back,
                "steps": steps,
            },
            rng=_rng_state(self.trainer.device),
            keep=self._keep,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if words := self.spec.disagreement(checkpoint.spec):
            raise RunError(f"{checkpoint.path} is of another run: {words}")
        try:
            self.trainer.load(checkpoint.weights, checkpoint.optimizer)
        except (KeyError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise RunError(f"{checkpoint.path} does not fit the network or its optimizer: {text}") from error
        _set_rng_state(checkpoint.rng, self.trainer.device)
        log.info("restored", checkpoint=str(checkpoint.path), updates=checkpoint.counters.get("updates"))


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
