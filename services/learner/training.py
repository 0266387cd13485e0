"""The synchronous training core: batch in, metrics out, parameters updated; no asyncio, no clock, no I/O."""

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.learner.batches import TrainingBatch, rows_of
from services.learner.config import LearnerConfig
from services.learner.loss import LossInputs, LossTerms, vtrace_loss
from services.learner.parallel import ParallelNetwork
from shared.errors import RunError, TrainingDiverged
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
    gradient_norm: float  # before clipping
    learning_rate: float


class VTraceTrainer:
    """A network, its optimizer and the V-trace update. `updates` counts those of the run, done so far."""

    def __init__(self, network: nn.Module, config: LearnerConfig, *, device: torch.device) -> None:
        self.updates = 0
        self.network = network.to(device)
        self.device = device
        self._config = config
        self._parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._forward = ParallelNetwork(
            self.network,
            self._parameters,
            threads=config.training_threads if device.type == "cpu" else 1,
            context=lambda: autocast(config.precision, device, self.network),
        )
        self.optimizer = _optimizer(self._parameters, config, device)

    def train(self, batch: TrainingBatch, *, steps: int) -> UpdateMetrics:
        """Does the next update, after `steps` steps of the run were consumed; metrics are means of its parts.

        Raises TrainingDiverged when a loss or a gradient is not finite; that gradient step is not done.
        """
        rate = learning_rate(self._config, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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
        self.optimizer.zero_grad(set_to_none=True)
        passed = self._forward(batch.inputs, batch.state)
        terms = self._loss(batch, passed.output)
        passed.backward(terms.total)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        metrics: list[float] = torch.stack([*(term.detach() for term in terms), norm]).tolist()
        _check_finite(metrics, self.updates + 1)
        if self._config.max_gradient_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self._config.max_gradient_norm, norm)
        self.optimizer.step()
        return metrics

    def weights(self) -> dict[str, Tensor]:
        """The network's weights, not copied. Raises TrainingDiverged when one is not finite."""
        weights: dict[str, Tensor] = self.network.state_dict()
        floating = [tensor for tensor in weights.values() if tensor.is_floating_point()]
        if not torch.isfinite(nn.utils.get_total_norm(floating, norm_type=math.inf)):
            raise TrainingDiverged(f"training diverged: after update {self.updates} a weight is not finite")
        return weights

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, not copied, and whose it is."""
        return {"optimizer": self._config.optimizer, **self.optimizer.state_dict()}

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's weights and optimizer state; what is configured stays as it is now.

        Raises RunError when the state is another optimizer's.
        """
        state = dict(optimizer_state)
        if (saved := state.pop("optimizer")) != self._config.optimizer:
            raise RunError(
                f"the checkpoint holds the state of optimizer {saved}, not of {self._config.optimizer}"
            )
        configured = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self.network.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)

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


def learning_rate(config: LearnerConfig, steps: int) -> float:
    """The learning rate after `steps` consumed steps."""
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(0.0, 1.0 - steps / config.total_steps)


def warm_up() -> None:
    """Makes torch load what it loads with the first optimizer of a process: a second or more of work."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).zero_grad()


def _check_finite(metrics: list[float], update: int) -> None:
    named = dict(zip(UpdateMetrics._fields, metrics, strict=False))
    for name in ("policy_loss", "baseline_loss", "entropy_loss", "gradient_norm"):
        value = named[name]
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"training diverged at update {update}: the {name.replace('_', ' ')} is {value}; "
                f"a smaller --learning-rate, --reward-clip or --max-gradient-norm may help"
            )


def _optimizer(
    parameters: list[nn.Parameter], config: LearnerConfig, device: torch.device
) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
        )
    return torch.optim.RMSprop(
        parameters,
        lr=config.learning_rate,
        alpha=config.rmsprop_decay,
        eps=config.rmsprop_epsilon,
        momentum=config.rmsprop_momentum,
        foreach=True,
    )
