"""The synchronous R2D2 training core: sequences in, metrics and priorities out; no asyncio, no I/O."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.learner.config import LearnerConfig
from services.learner.optimizing import OptimizedNetwork
from services.learner.sequences import SequenceBatch
from shared.algorithms.priorities import sequence_priorities
from shared.algorithms.returns import double_q_targets
from shared.networks.calls import call_network
from shared.networks.interface import NetworkInput
from shared.networks.precision import autocast


class R2D2Metrics(NamedTuple):
    """What one update was like; means are over the trained steps but reset steps."""

    total_loss: float
    td_error: float  # mean |δ|, in rescaled space
    q_value: float  # mean Q of the actions taken, in rescaled space
    target: float  # mean target, in rescaled space
    importance_weight: float  # mean
    reward: float  # mean, not clipped
    gradient_norm: float  # before clipping
    priority: float  # mean of the new ones
    learning_rate: float


class R2D2Trainer(OptimizedNetwork):
    """An online network with its optimizer, a target network, and the R2D2 update.

    Kapturowski et al. 2019, section 2.3: the stored recurrent state is brought up to date by `burn_in` steps,
    of each network by itself and without gradient; the steps after them are trained.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig, *, device: torch.device) -> None:
        super().__init__(network, config, device=device)
        self._autocast = autocast(config.precision, device, self.network)
        self.target_network = deepcopy(self.network).requires_grad_(False)
        for module in self.target_network.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # cuDNN would do it at every call: copied, each lies by itself
        self.priorities: NDArray[np.float64] = np.zeros(0)  # [B], of the newest update's sequences

    def train(self, batch: SequenceBatch, *, steps: int) -> R2D2Metrics:
        """Does the next update, after `steps` steps of the run were consumed; leaves `priorities`.

        Raises TrainingDiverged when the loss or a gradient is not finite; that gradient step is not done.
        """
        rate = self._set_learning_rate(steps)
        errors, figures = self._errors(batch)
        loss = 0.5 * (batch.importance_weights * errors.square().sum(0)).mean()
        numbers = self._descend(loss.backward, {"total_loss": loss, **figures})
        valid = ~batch.reset_steps[self._config.burn_in :]
        self.priorities = sequence_priorities(
            errors.detach().t().cpu().numpy(), valid.t().cpu().numpy(), self._config.priority_eta
        )
        self.updates += 1
        if (self.updates - self.rolled_back) % self._config.target_update_period == 0:
            self.target_network.load_state_dict(self.network.state_dict())
        return R2D2Metrics(**numbers, priority=float(self.priorities.mean()), learning_rate=rate)

    def optimizer_state(self) -> dict[str, Any]:
        """As the base's, and the target network's weights."""
        return {**super().optimizer_state(), "target_network": self.target_network.state_dict()}

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Any]) -> None:
        """As the base's, the target network's weights too."""
        state = dict(optimizer_state)
        self.target_network.load_state_dict(state.pop("target_network"))
        super().load(weights, state)

    def _errors(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """δ of the trained steps [L − burn_in, B] with gradient, 0 at reset steps; and their figures."""
        config = self._config
        trained = slice(config.burn_in, None)
        online_q = self._unrolled(self.network, batch)
        with torch.no_grad():
            target_q = self._unrolled(self.target_network, batch)
        resets = batch.reset_steps[trained]
        targets = double_q_targets(
            online_q=online_q.detach(),
            target_q=target_q,
            rewards=batch.reward[trained],
            discounts=config.discount * (~batch.terminated[trained]).float(),
            n=config.n_steps,
            reset_steps=resets,
        )
        chosen = online_q[:-1].gather(-1, batch.action[trained].unsqueeze(-1)).squeeze(-1)
        errors = (targets - chosen).masked_fill(resets, 0.0)
        count = (~resets).sum().clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return values.detach().masked_fill(resets, 0.0).sum() / count

        return errors, {
            "td_error": mean(errors.abs()),
            "q_value": mean(chosen),
            "target": mean(targets),
            "importance_weight": batch.importance_weights.mean(),
            "reward": batch.mean_reward,
        }

    def _unrolled(self, network: nn.Module, batch: SequenceBatch) -> Tensor:
        """Q of the observations after burn-in [L − burn_in + 1, B, A]."""
        burn_in, state = self._config.burn_in, batch.state
        if burn_in and state:
            # In an autocast of its own: it keeps the weights it casts, and these have no gradient.
            with torch.no_grad(), self._autocast:
                _, state = call_network(network, _steps(batch.inputs, slice(0, burn_in)), state)
        with self._autocast:
            output, _ = call_network(network, _steps(batch.inputs, slice(burn_in, None)), state)
        q_values: Tensor = output.q_values
        return q_values


def _steps(inputs: NetworkInput, steps: slice) -> NetworkInput:
    return inputs.map(lambda value: value[steps])
