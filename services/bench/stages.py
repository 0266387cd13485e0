"""What one environment step costs in each stage alone: stepping, inference, learning.

Each stage runs in a process of its own, `python -m services.bench.stages STAGE --preset CONFIG.yaml`, that is
set up as the stage's service is, with as little around it as possible: what the services add to this is what
the pipeline loses. It stays through the whole measurement, and the pipeline stands still for each of its
turns: on a machine whose speed varies by the second, what is compared is seconds apart.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import orjson
import torch

from services.actor.autoreset import episode_starts
from services.actor.service import group_maker
from services.actor.spaces import ActionDecoder, ObservationEncoder, environment_spec
from services.bench.config import PipelineConfig
from services.bench.cpu import own_cpu_seconds
from services.inference.graphs import GraphedNetwork
from services.learner.batches import TrainingBatch
from services.learner.r2d2 import R2D2Trainer
from services.learner.sequences import SequenceBatch
from services.learner.training import VTraceTrainer
from shared.config import load
from shared.errors import RunError, SeedrlError
from shared.memory import keep_freed_memory
from shared.networks.build import build_network
from shared.networks.interface import NetworkOutput, QOutput
from shared.networks.precision import autocast, resolve_device
from shared.networks.unroll import network_input, next_history
from shared.run_spec import own_spec
from shared.specs import RunSpec
from shared.telemetry import configure_logging

T = TypeVar("T")
Leaves = dict[str, torch.Tensor]
Stage = Literal["env", "inference", "learner"]
STAGES: tuple[Stage, ...] = ("env", "inference", "learner")

_WARM_UP = 3  # units of work before the first turn


class StageTurn(NamedTuple):
    """What a stage did while it was alone."""

    cost_seconds: float  # on its clock: of the CPU, or of a wall where the device computes
    steps: float
    still_seconds: float  # for which the others stood still


def turn_alone(
    work: Callable[[], float],
    *,
    seconds: float,
    clock: Callable[[], float],
    beside: Iterable[int] = (),
) -> StageTurn:
    """Does `work`, which does some and returns how many steps, until `seconds` are over.

    The processes `beside` stand still meanwhile, so that the stage is alone.
    """
    stopped = time.monotonic()
    with standing_still(beside):
        steps, began, end = 0.0, clock(), time.monotonic() + seconds
        while time.monotonic() < end:
            steps += work()
        cost = clock() - began
    return StageTurn(cost, steps, time.monotonic() - stopped)


@contextmanager
def standing_still(processes: Iterable[int]) -> Iterator[None]:
    """SIGSTOP to those of the `processes` that there are, and SIGCONT afterwards."""
    stopped = list(processes)
    try:
        _signal(signal.SIGSTOP, stopped)
        yield
    finally:
        go_on(stopped)


def go_on(processes: Iterable[int]) -> None:
    """SIGCONT to those of the `processes` that there are."""
    _signal(signal.SIGCONT, processes)


def _signal(number: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def env_work(config: PipelineConfig) -> Callable[[], float]:
    """Steps one group with random actions; returns the steps that were no reset steps."""
    group: Any = group_maker(config)()
    _, info = group.reset(seed=0)
    starts = episode_starts(group, info)
    actions = np.random.default_rng(0).integers(group.single_action_space.n, size=(1000, config.group_size))
    number = _endless(ActionDecoder(group.single_action_space)(actions))

    def work() -> int:
        _, _, terminated, truncated, info = group.step(next(number))
        return config.group_size - int(
            starts.after(info, terminated=np.asarray(terminated), truncated=np.asarray(truncated)).sum()
        )

    return work


def inference_work(config: PipelineConfig) -> Callable[[], float]:
    """The network's forward pass for one group, its frames stacked, and one sampled action per row."""
    torch.set_num_threads(config.torch_threads)
    device = resolve_device(config.device)
    spec, frames = _recorded(config, steps=8)
    network = build_network(spec).to(device).eval()
    forward: Any = GraphedNetwork(network, device) if config.cuda_graphs else network
    rows = config.group_size
    zeros = torch.zeros(rows, device=device)
    no_first = torch.zeros(rows, 1, dtype=torch.bool, device=device)
    state = network.initial_state(rows)
    history = _history(frames, rows, stack=spec.network.frame_stack, device=device)
    action = zeros.long()
    newest = _endless(
        [{name: _staged(leaf[:, t : t + 1], device) for name, leaf in frames.items()} for t in range(8)]
    )
    context = autocast(config.precision, device, network)
    context.__enter__()  # type: ignore[no-untyped-call]  # as long as the weights stay, as in the service

    choose = _explored if spec.agent == "r2d2" else _sampled

    def work() -> int:
        nonlocal state, action, history
        with torch.no_grad():
            inputs = network_input(
                frames={name: leaf.to(device, non_blocking=True) for name, leaf in next(newest).items()},
                history=history,
                is_first=no_first,
                previous_action=action,
                previous_reward=zeros,
                reward_clip=spec.reward_clip,
            )
            output, state = forward(inputs, state)
            history = {name: next_history(inputs.observation[name][0]) for name in history}
            action = choose(output)
            action.cpu()  # waits for the device
        return rows

    if config.cuda_graphs:
        work()
        if not forward.captured:
            raise RunError(f"network {config.network} cannot be captured as a CUDA graph")
    return work


def _staged(frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As the service has them for a GPU: in pinned memory."""
    return frames.contiguous().pin_memory() if device.type == "cuda" else frames


def _sampled(output: NetworkOutput) -> torch.Tensor:
    logits = output.policy_logits[0]
    return (logits - torch.empty_like(logits).exponential_().log_()).argmax(dim=1)


def _explored(output: QOutput) -> torch.Tensor:
    """ε-greedy with one ε for all."""
    values = output.q_values[0]
    other = torch.randint_like(values[:, 0], values.shape[1])
    return torch.where(torch.rand_like(values[:, 0]) < 0.1, other, values.argmax(dim=1)).long()


def learner_work(config: PipelineConfig) -> Callable[[], float]:
    """One update of the weights: inputs built, forward, loss, backward, optimizer; R2D2: priorities, too.

    Of R2D2's environment steps each is trained `replay_ratio` times on average, after its burn-in.
    """
    torch.set_num_threads(config.torch_threads)
    device = resolve_device(config.device)
    is_r2d2 = config.agent == "r2d2"
    rows, steps, trained = config.batch_size, config.unroll, float(config.batch_size * config.unroll)
    if is_r2d2:
        steps = config.burn_in + config.sequence_length
        trained = rows * config.sequence_length / config.replay_ratio
    spec, recorded = _recorded(config, steps=steps + 1, rows=rows)
    frames = {name: leaf.to(device) for name, leaf in recorded.items()}  # the service copies beside training
    history = _history(frames, rows, stack=spec.network.frame_stack, device=device)
    network = build_network(spec)
    state = network.initial_state(rows)
    actions = spec.environment.num_actions
    is_first = torch.zeros(rows, steps + 1, dtype=torch.bool, device=device)
    flags = torch.zeros(steps, rows, dtype=torch.bool, device=device)
    action = torch.randint(actions, (rows, steps), device=device)
    reward = torch.randn(rows, steps, device=device)
    trainer: Any
    batch: Callable[..., Any]
    if is_r2d2:
        trainer = R2D2Trainer(network, config, device=device)
        batch = partial(SequenceBatch, importance_weights=torch.ones(rows, device=device))
    else:
        trainer = VTraceTrainer(network, config, device=device)
        batch = partial(TrainingBatch, behaviour_logits=torch.zeros(steps, rows, actions, device=device))

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
        training = batch(
            inputs=inputs,
            state=tuple(leaf.to(device) for leaf in state),
            action=action.t(),
            reward=reward.t(),
            terminated=flags,
            reset_steps=flags,
            mean_reward=reward.mean(),
        )
        trainer.train(training, steps=0)
        return trained

    return work


def _history(frames: Leaves, rows: int, *, stack: int, device: torch.device) -> Leaves:
    """Zeros [rows, stack − 1, …] of every leaf; empty without stacking."""
    return {
        name: torch.zeros(rows, stack - 1, *leaf.shape[2:], dtype=leaf.dtype, device=device)
        for name, leaf in frames.items()
        if stack > 1
    }


def _recorded(config: PipelineConfig, *, steps: int, rows: int | None = None) -> tuple[RunSpec, Leaves]:
    """The run's spec, and observations [rows, steps, …] of every leaf; rows beyond a group's are repeated."""
    group: Any = group_maker(config)()
    spec = own_spec(config, environment_spec(group.single_observation_space, group.single_action_space))
    encode = ObservationEncoder(group.single_observation_space, group_size=config.group_size)
    decode = ActionDecoder(group.single_action_space)
    observation, _ = group.reset(seed=0)
    random = np.random.default_rng(0)
    recorded: dict[str, list[torch.Tensor]] = {leaf.name: [] for leaf in spec.environment.observation}
    for _ in range(steps):
        for leaf, data in zip(spec.environment.observation, encode(observation), strict=True):
            array = np.frombuffer(data, leaf.dtype).reshape(config.group_size, *leaf.shape)
            repeated = np.resize(array, (rows or config.group_size, *leaf.shape))
            recorded[leaf.name].append(torch.from_numpy(repeated.copy()))
        actions = random.integers(group.single_action_space.n, size=config.group_size)
        observation, *_ = group.step(decode(actions))
    group.close()
    return spec, {name: torch.stack(leaves, dim=1) for name, leaves in recorded.items()}


def _endless(items: Iterable[T]) -> Iterator[T]:
    while True:
        yield from items


def main(stage: str, arguments: Sequence[str]) -> None:
    """Measures `stage` with the settings in `arguments` whenever it is asked to, until nobody asks any more.

    A line of JSON in, the processes that stand still meanwhile; one out, the StageTurn.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an environment prints is no answer
    config = load(PipelineConfig, arguments, prog="stages", known=())
    configure_logging("warning", config.log_format, "bench")
    keep_freed_memory()
    works: dict[str, Callable[[PipelineConfig], Callable[[], float]]] = {
        "env": env_work,
        "inference": inference_work,
        "learner": learner_work,
    }
    on_cpu = stage == "env" or resolve_device(config.device).type == "cpu"
    clock = own_cpu_seconds if on_cpu else time.perf_counter
    work = works[stage](config)
    for _ in range(_WARM_UP):
        work()
    for line in sys.stdin:
        turn = turn_alone(work, seconds=config.stage_seconds, clock=clock, beside=orjson.loads(line))
        print(orjson.dumps([*turn]).decode(), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except SeedrlError as error:
        sys.exit(f"seedrl: {error}")
