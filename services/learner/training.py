"""The synchronous V-trace training core: batch in, metrics out, parameters updated; no asyncio, no I/O."""

from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import nn

from services.learner.batches import TrainingBatch, rows_of
from services.learner.config import LearnerConfig
from services.learner.loss import LossInputs, LossTerms, vtrace_loss
from services.learner.optimizing import OptimizedNetwork
from services.learner.parallel import ParallelNetwork
from shared.networks.interface import NetworkOutput
from shared.networks.precision import autocast


class UpdateMetrics(NamedTuple):
    """What one update was like; losses with their costs and after the reduction."""

    total_loss: float
    policy_loss: float
    baseline_loss: float
    entropy_loss: float
    entropy: float  # mean over the steps, in nats
    value: float  # mean of V
    target: float  # mean V-trace target
    rho: float  # mean importance weight, not truncated
    reward: float  # mean of the whole batch, neither clipped nor scaled
    gradient_norm: float  # before clipping
    learning_rate: float


class VTraceTrainer(OptimizedNetwork):
    """A network, its optimizer and the V-trace update."""

    def __init__(self, network: nn.Module, config: LearnerConfig, *, device: torch.device) -> None:
        super().__init__(network, config, device=device)
        self._forward = ParallelNetwork(
            self.network,
            self._parameters,
            threads=config.training_threads if device.type == "cpu" else 1,
            context=lambda: autocast(config.precision, device, self.network),
        )

    def train(self, batch: TrainingBatch, *, steps: int) -> UpdateMetrics:
        """Does the next update, after `steps` steps of the run were consumed; metrics are means of its parts.

        Raises TrainingDiverged when a loss or a gradient is not finite; that gradient step is not done.
        """
        rate = self._set_learning_rate(steps)
        parts = [self._step(part) for part in self._parts(batch)]
        self.updates += 1
        return UpdateMetrics._make([*map(fmean, zip(*parts, strict=True)), rate])

    def _parts(self, batch: TrainingBatch) -> Iterator[TrainingBatch]:
        """What the gradient steps of one update are made of."""
        for _ in range(self._config.sample_reuse):
            if self._config.minibatches == 1:
                yield batch
                continue
            order = torch.randperm(batch.action.shape[1], device=batch.action.device)
            for rows in order.chunk(self._config.minibatches):
                yield rows_of(batch, rows)

    def _step(self, batch: TrainingBatch) -> list[float]:
        """One gradient step; all metrics but the learning rate."""
        passed = self._forward(batch.inputs, batch.state)
        terms = self._loss(batch, passed.output)
        figures = {**terms._asdict(), "reward": batch.mean_reward}
        return list(self._descend(partial(passed.backward, terms.total_loss), figures).values())

    def _loss(self, batch: TrainingBatch, output: NetworkOutput) -> LossTerms:
        config = self._config
        return vtrace_loss(
            LossInputs(
                policy_logits=output.policy_logits[:-1],
                baseline=output.baseline[:-1],
                bootstrap_value=output.baseline[-1],
                behaviour_logits=batch.behaviour_logits,
                action=batch.action,
                reward=batch.reward * config.reward_scale,
                terminated=batch.terminated,
                reset_steps=batch.reset_steps,
            ),
            discount=config.discount,
            lambda_=config.trace_lambda,
            max_rho=config.max_rho,
            max_pg_rho=config.max_pg_rho,
            baseline_cost=config.baseline_cost,
            entropy_cost=config.entropy_cost,
            reduction=config.loss_reduction,
            normalize_advantages=config.normalize_advantages,
            policy_clip=config.policy_clip,
        )
