"""What learning costs alone for R2D2: updates from sequences that lie on the device."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from services.bench.config import PipelineConfig
from services.learner.r2d2 import R2D2Trainer
from services.learner.sequences import SequenceBatch
from shared.networks.build import build_network
from shared.networks.precision import resolve_device
from shared.networks.unroll import network_input
from shared.specs import RunSpec


def steps_per_update(config: PipelineConfig) -> float:
    """Environment steps that an update stands for: each is trained `replay_ratio` times on average."""
    return config.batch_size * config.sequence_length / config.replay_ratio


def r2d2_learner_work(
    config: PipelineConfig, spec: RunSpec, frames: Mapping[str, Tensor], history: Mapping[str, Tensor]
) -> Callable[[], float]:
    """One update: inputs built, burn-in and unroll of both networks, backward, optimizer, priorities.

    `frames` [B, L + 1, …] and `history` [B, S − 1, …] of every leaf, on the device.
    """
    device = resolve_device(config.device)
    rows, steps = config.batch_size, config.burn_in + config.sequence_length
    network = build_network(spec)
    state = network.initial_state(rows)
    trainer = R2D2Trainer(network, config, device=device)
    is_first = torch.zeros(rows, steps + 1, dtype=torch.bool, device=device)
    flags = torch.zeros(steps, rows, dtype=torch.bool, device=device)
    action = torch.randint(spec.environment.num_actions, (rows, steps), device=device)
    reward = torch.randn(rows, steps, device=device)
    weights = torch.ones(rows, device=device)

    def work() -> float:
        inputs = network_input(
            frames=frames,
            history=history,
            is_first=is_first,
            previous_action=action[:, 0],
            previous_reward=reward[:, 0],
            action=action,
            reward=reward,
            reward_clip=spec.reward_clip,
        )
        batch = SequenceBatch(
            inputs=inputs,
            state=tuple(leaf.to(device) for leaf in state),
            action=action.t(),
            reward=reward.t(),
            terminated=flags,
            reset_steps=flags,
            importance_weights=weights,
        )
        trainer.train(batch, steps=0)
        return steps_per_update(config)

    return work
