"""CPU µs of one core that a step of ALE/Pong-v5 costs in each stage, by the shortest code that does it.

An independent check of `seedrl bench pipeline`: it imports no service. With --plain: float32, contiguous, and
what else torch and glibc do by default. The learner runs with MALLOC_TOP_PAD_=268435456
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 in its environment: so should this.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch

from shared.algorithms.vtrace import vtrace_targets
from shared.networks.build import build_network
from shared.networks.convolutional import PixelConv2d
from shared.networks.precision import autocast
from shared.networks.unroll import network_input
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

ATARI: dict[str, Any] = {"stack_num": 1, "frameskip": 4, "maxpool": True, "noop_max": 30}
ATARI |= {"repeat_action_probability": 0.0, "reward_clipping": False, "use_fire_reset": False}
ATARI |= {"episodic_life": False, "life_loss_info": True}


def microseconds(work: Callable[[], object], steps: int, *, seconds: float, windows: int = 5) -> float:
    """Median CPU µs per step over the windows; `work` does `steps` steps."""
    figures = []
    for window in range(windows + 1):
        count, cpu, end = 0, time.process_time(), time.monotonic() + seconds
        while time.monotonic() < end:
            work()
            count += steps
        figures += [1e6 * (time.process_time() - cpu) / count] if window else []  # the first one warms up
    return median(figures)


def main() -> None:
    """Prints the figures as one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="impala_shallow", help="nature, impala_shallow or impala_deep")
    parser.add_argument("--group-size", type=int, default=32, help="environments, and rows of inference")
    parser.add_argument("--unroll", type=int, default=20, help="steps of a trajectory")
    parser.add_argument("--batch-size", type=int, default=32, help="trajectories of an update")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of the five windows")
    parser.add_argument("--plain", action="store_true", help="float32, contiguous, no fused steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gymnasium.register_envs(ale_py)
    group, length, batch = args.group_size, args.unroll, args.batch_size

    vector = gymnasium.make_vec(
        "ALE/Pong-v5", num_envs=group, vectorization_mode="vector_entry_point", **ATARI
    )
    vector.reset(seed=0)
    random = np.random.default_rng(0)
    env = microseconds(lambda: vector.step(random.integers(6, size=group)), group, seconds=args.seconds)
    frames = torch.from_numpy(
        np.stack([vector.step(random.integers(6, size=group))[0] for _ in range(length + 1)])
    )
    frames = frames.reshape(length + 1, group, 84, 84).transpose(0, 1)

    leaf = LeafSpec(name="observation", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))
    spec = RunSpec(
        environment=EnvironmentSpec(observation=(leaf,), num_actions=6),
        network=NetworkSpec(name=args.network, lstm_size=0, frame_stack=4, hidden_sizes=(64, 64)),
        agent="vtrace", unroll=length, reward_clip=1.0,
    )  # fmt: skip
    network = build_network(spec)
    if args.plain:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module in network.modules():
            if isinstance(module, PixelConv2d):
                module._memory_format = torch.contiguous_format
    context = contextlib.nullcontext() if args.plain else autocast("auto", torch.device("cpu"), network)
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-6, eps=0.01, foreach=not args.plain)

    def inputs(rows: int, steps: int) -> dict[str, Any]:
        shown = frames.repeat(-(-rows // group), 1, 1, 1)[:rows, :steps].contiguous()
        return {
            "frames": {"observation": shown},
            "history": {"observation": torch.zeros(rows, 3, 84, 84, dtype=torch.uint8)},
            "is_first": torch.zeros(rows, steps, dtype=torch.bool),
            "previous_action": torch.zeros(rows, dtype=torch.int64),
            "previous_reward": torch.zeros(rows),
            "reward_clip": 1.0,
        }

    one, whole = inputs(group, 1), inputs(batch, length + 1)
    action, reward = torch.randint(6, (batch, length)), torch.randn(batch, length)

    def infer() -> object:
        with torch.no_grad():
            logits = network(network_input(**one), ())[0].policy_logits[0]
            return torch.multinomial(logits.softmax(-1), 1)

    def learn() -> None:
        with context:
            output, _ = network(network_input(**whole, action=action, reward=reward), ())
        log_policy = output.policy_logits[:-1].log_softmax(-1)
        chosen = log_policy.gather(-1, action.t().unsqueeze(-1)).squeeze(-1)
        targets = vtrace_targets(
            log_rhos=chosen.detach() + np.log(6),
            discounts=torch.full((length, batch), 0.99),
            rewards=reward.t(),
            values=output.baseline[:-1].detach(),
            bootstrap_value=output.baseline[-1].detach(),
        )
        entropy = -(log_policy.exp() * log_policy).sum()
        error = (targets.values - output.baseline[:-1]).square().sum()
        optimizer.zero_grad()
        loss = 0.25 * error - (chosen * targets.advantages).sum() - 0.01 * entropy
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 40.0)
        optimizer.step()

    with context:  # as long as the weights stay, as inference does
        inference = microseconds(infer, group, seconds=args.seconds)
    learner = microseconds(learn, batch * length, seconds=args.seconds)
    figures = {"env": env, "inference": inference, "learner": learner}
    figures["bound_of_2_cores"] = 2e6 / sum(figures.values())
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
