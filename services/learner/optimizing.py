"""What the training cores share: a network with its optimizer, its weights and its part of a checkpoint."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from services.learner.config import LearnerConfig
from shared.errors import RunError, TrainingDiverged


class OptimizedNetwork:
    """A network and its optimizer.

    `updates` counts those of the run, done so far; `rolled_back` those among them that a crash lost.
    """

    def __init__(self, network: nn.Module, config: LearnerConfig, *, device: torch.device) -> None:
        self.updates = 0
        self.rolled_back = 0
        self.network = network.to(device)
        self.device = device
        self._config = config
        self._parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self._parameters, config, device)

    def weights(self) -> dict[str, Tensor]:
        """The network's weights, not copied. Raises TrainingDiverged when one is not finite."""
        weights: dict[str, Tensor] = self.network.state_dict()
        # Buffers do not diverge, and may hold infinities of their own, as a mask does.
        learned = [parameter for parameter in self._parameters if parameter.numel()]
        if not torch.isfinite(nn.utils.get_total_norm(learned, norm_type=math.inf)):
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
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                # A checkpoint's are contiguous. In another layout than its parameter's, one would take all
                # parameters off the optimizer's quick path.
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    kept[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        if self._config.optimizer == "rmsprop" and self._config.rmsprop_momentum:
            for parameter, kept in self.optimizer.state.items():  # it may have had none until now
                kept.setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _set_learning_rate(self, steps: int) -> float:
        """The learning rate of an update after `steps` consumed steps, now also the optimizer's."""
        rate = learning_rate(self._config, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _descend(self, backward: Callable[[], None], figures: Mapping[str, Tensor]) -> dict[str, float]:
        """One gradient step; `figures` as numbers, and the gradient's norm before clipping.

        Args:
            backward: sets the gradients.
            figures: what the step is judged by; a name that ends in "_loss" must be finite.

        Raises TrainingDiverged, without the step, when a loss among them or a gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        backward()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        named = {**figures, "gradient_norm": norm}
        values = torch.stack([tensor.detach() for tensor in named.values()]).tolist()
        numbers = dict(zip(named, values, strict=True))
        _check_finite(numbers, self.updates + 1)
        if self._config.max_gradient_norm:
            nn.utils.clip_grads_with_norm_(self._parameters, self._config.max_gradient_norm, norm)
        self.optimizer.step()
        return numbers


def learning_rate(config: LearnerConfig, steps: int) -> float:
    """The learning rate after `steps` consumed steps."""
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(0.0, 1.0 - steps / config.total_steps)


def warm_up() -> None:
    """Makes torch load what it loads with the first optimizer of a process: a second or more of work."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).zero_grad()


def _check_finite(figures: Mapping[str, float], update: int) -> None:
    """The parts of a loss first: they say where it came from."""
    last = ("total_loss", "gradient_norm")
    parts = [name for name in figures if name.endswith("_loss") and name not in last]
    for name in (*parts, *last):
        if not math.isfinite(value := figures[name]):
            raise TrainingDiverged(
                f"training diverged at update {update}: the {name.replace('_', ' ')} is {value}; "
                f"a smaller --learning-rate, --reward-clip or --max-gradient-norm may help"
            )


def _optimizer(
    parameters: list[nn.Parameter], config: LearnerConfig, device: torch.device
) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        # On a CPU the fused one believes, without a look, that gradients and moments lie in memory as the
        # parameter does. What threads sum up and what checkpoints hold is contiguous; channels_last is not.
        fused = device.type in ("cpu", "cuda") and all(each.is_contiguous() for each in parameters)
        return torch.optim.Adam(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=fused,
            foreach=not fused,
        )
    return torch.optim.RMSprop(
        parameters,
        lr=config.learning_rate,
        alpha=config.rmsprop_decay,
        eps=config.rmsprop_epsilon,
        momentum=config.rmsprop_momentum,
        foreach=True,
    )
