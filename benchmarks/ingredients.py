"""CPU µs of one core that a step of ALE/Pong-v5 costs in each stage, by the shortest code that does it.

An independent check of `seedrl bench pipeline`: it imports no service. With --plain: float32, contiguous, and
what else torch and glibc do by default.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import ale_py
import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from shared.algorithms.vtrace import vtrace_targets
from shared.memory import keep_freed_memory
from shared.networks.build import build_network
from shared.networks.convolutional import PixelConv2d
from shared.networks.precision import autocast
from shared.networks.unroll import network_input
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

ATARI: dict[str, Any] = {"stack_num": 1, "frameskip": 4, "maxpool": True, "noop_max": 30}
ATARI |= {"repeat_action_probability": 0.0, "reward_clipping": False, "use_fire_reset": False}
ATARI |= {"episodic_life": False, "life_loss_info": True}


class Ingredient(NamedTuple):
    """A stage of the pipeline."""

    work: Callable[[], object]
    steps: int  # that one call of it does
    context: AbstractContextManager[Any] = contextlib.nullcontext()  # held as long as the weights stay


def microseconds(ingredient: Ingredient, *, seconds: float) -> float:
    """CPU µs per step within so many seconds."""
    count, cpu, end = 0, time.process_time(), time.monotonic() + seconds
    with ingredient.context:
        while time.monotonic() < end:
            ingredient.work()
            count += ingredient.steps
    return 1e6 * (time.process_time() - cpu) / count


def built(name: str, *, unroll: int, plain: bool) -> nn.Module:
    """The network that a run on Pong would have."""
    leaf = LeafSpec(name="observation", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))
    environment = EnvironmentSpec(observation=(leaf,), num_actions=6)
    spec = NetworkSpec(name=name, frame_stack=4)
    network = build_network(
        RunSpec(environment=environment, network=spec, agent="vtrace", unroll=unroll, reward_clip=1.0)
    )
    for module in network.modules() if plain else ():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if isinstance(module, PixelConv2d):
            module._memory_format = torch.contiguous_format
    return network


def inputs(frames: Tensor, rows: int, steps: int) -> dict[str, Any]:
    """Arguments of `network_input` from recorded frames [B, T, 84, 84]."""
    return {
        "frames": {
            "observation": frames.repeat(-(-rows // len(frames)), 1, 1, 1)[:rows, :steps].contiguous()
        },
        "history": {"observation": torch.zeros(rows, 3, 84, 84, dtype=torch.uint8)},
        "is_first": torch.zeros(rows, steps, dtype=torch.bool),
        "previous_action": torch.zeros(rows, dtype=torch.int64),
        "previous_reward": torch.zeros(rows),
        "reward_clip": 1.0,
    }


def act(network: nn.Module, given: dict[str, Any]) -> Tensor:
    """Actions [B] for one observation of each row."""
    with torch.no_grad():
        logits = network(network_input(**given), ())[0].policy_logits[0]
        return torch.multinomial(logits.softmax(-1), 1)


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, context: Any, given: dict[str, Any]) -> None:
    """One update with the values of IMPALA."""
    with context:
        output, _ = network(network_input(**given), ())
    log_policy = output.policy_logits[:-1].log_softmax(-1)
    chosen = log_policy.gather(-1, given["action"].t().unsqueeze(-1)).squeeze(-1)
    targets = vtrace_targets(
        log_rhos=chosen.detach() + np.log(6),
        discounts=torch.full_like(chosen, 0.99),
        rewards=given["reward"].t(),
        values=output.baseline[:-1].detach(),
        bootstrap_value=output.baseline[-1].detach(),
    )
    entropy = -(log_policy.exp() * log_policy).sum()
    error = (targets.values - output.baseline[:-1]).square().sum()
    optimizer.zero_grad()
    loss = 0.25 * error - (chosen * targets.advantages).sum() - 0.01 * entropy
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 40.0)
    optimizer.step()


def ingredients(
    network_name: str, *, group: int, length: int, batch: int, plain: bool = False
) -> dict[str, Ingredient]:
    """Stepping `group` environments, inference for as many rows, an update from `batch` × `length` steps."""
    gymnasium.register_envs(ale_py)
    vector = gymnasium.make_vec(
        "ALE/Pong-v5", num_envs=group, vectorization_mode="vector_entry_point", **ATARI
    )
    vector.reset(seed=0)
    random = np.random.default_rng(0)

    def step() -> Any:
        return vector.step(random.integers(6, size=group))

    shown = [step()[0].reshape(group, 84, 84) for _ in range(length + 1)]
    frames = torch.from_numpy(np.stack(shown, axis=1))
    network = built(network_name, unroll=length, plain=plain)
    context = contextlib.nullcontext() if plain else autocast("auto", torch.device("cpu"), network)
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-6, eps=0.01, foreach=not plain)
    trained = {"action": torch.randint(6, (batch, length)), "reward": torch.randn(batch, length)}
    update = partial(learn, network, optimizer, context, inputs(frames, batch, length + 1) | trained)
    return {
        "env": Ingredient(step, group),
        "inference": Ingredient(partial(act, network, inputs(frames, group, 1)), group, context),
        "learner": Ingredient(update, batch * length),
    }


def main() -> None:
    """Prints the figures as one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="impala_shallow", help="nature, impala_shallow or impala_deep")
    parser.add_argument("--group-size", type=int, default=128, help="environments, and rows of inference")
    parser.add_argument("--unroll", type=int, default=20, help="steps of a trajectory")
    parser.add_argument("--batch-size", type=int, default=32, help="trajectories of an update")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of the five windows")
    parser.add_argument("--plain", action="store_true", help="float32, contiguous, nothing kept or fused")
    args = parser.parse_args()
    if not args.plain:
        keep_freed_memory()
    torch.set_num_threads(1)
    sizes = {"group": args.group_size, "length": args.unroll, "batch": args.batch_size}
    figures = {}
    for name, ingredient in ingredients(args.network, plain=args.plain, **sizes).items():
        _, *windows = (microseconds(ingredient, seconds=args.seconds) for _ in range(6))  # one warms up
        figures[name] = median(windows)
    figures["bound_of_2_cores"] = 2e6 / sum(figures.values())
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
