"""A counting environment's history, its chunks, and a network whose every output can be told from it.

Everything is indexed by the time `n` of an environment's observations, from the first to the last, so that
an oracle needs no unrolls: a shift by one anywhere between history and loss shows as a wrong number.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from shared.networks.interface import NetworkInput, NetworkOutput, State
from shared.specs import LeafSpec, RunSpec
from shared.types import Array, Chunk
from tests.support.learner_chunks import make_chunk, make_spec

COUNTER = LeafSpec(name="counter", dtype="float32", shape=(), low=(0.0,), high=(float("inf"),))
ACTIONS = 3
STACK = 3
REWARD_CLIP = 2.0


def counting_spec(unroll: int, *, frame_stack: int = STACK) -> RunSpec:
    """The spec of runs in the counting environment."""
    return make_spec(
        unroll=unroll,
        actions=ACTIONS,
        network="tests.support.learner_history:CountingNetwork",
        frame_stack=frame_stack,
        observation=(COUNTER,),
        reward_clip=REWARD_CLIP,
    )


class CountingNetwork(nn.Module):
    """Counts the steps of an episode; its baseline and logits mix everything it is given.

    `weight` is 1 and multiplies the outputs, so that there is something to learn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 1),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        count, counts = state[0][:, 0], []
        for first in inputs.is_first:
            count = torch.where(first, 0.0, count) + 1
            counts.append(count)
        frames = inputs.observation["counter"]  # [T, B, S]
        seen = torch.stack(counts)
        baseline = mixed(seen, frames, inputs.previous_action, inputs.previous_reward)
        logits = seen.unsqueeze(-1) % 5 * torch.arange(ACTIONS) / 10
        return NetworkOutput(logits * self.weight, baseline * self.weight), (count.unsqueeze(-1),)


def mixed(count: Tensor, frames: Tensor, previous_action: Tensor, previous_reward: Tensor) -> Tensor:
    """V: a number that tells every input apart."""
    places = torch.arange(1, frames.shape[-1] + 1, dtype=torch.float32)
    return 0.1 * count + 0.01 * (frames * places).sum(-1) + 0.3 * previous_action + 0.7 * previous_reward


@dataclass
class History:
    """`B` environments over `N` steps. Row `n` of the last four follows `action[:, n]`."""

    observation: Array  # [B, N + 1]
    is_first: Array  # [B, N + 1]
    action: Array  # [B, N]
    logits: Array  # [B, N, A], of the behaviour
    reward: Array  # [B, N], raw
    terminated: Array  # [B, N]
    truncated: Array  # [B, N]

    @staticmethod
    def random(*, rows: int, steps: int, seed: int) -> "History":
        """Short episodes that end by themselves or are truncated, with lives lost in between."""
        random = np.random.default_rng(seed)
        chance = random.random((rows, steps))
        is_first = np.zeros((rows, steps + 1), bool)
        is_first[:, 0] = random.random(rows) < 0.5
        terminated, truncated = np.zeros((rows, steps), bool), np.zeros((rows, steps), bool)
        for row in range(rows):
            over = False
            for n in range(steps):
                if over:  # this action is ignored; the next episode's first observation follows
                    is_first[row, n + 1], over = True, False
                    continue
                terminated[row, n] = chance[row, n] < 0.2
                truncated[row, n] = 0.2 <= chance[row, n] < 0.3
                over = chance[row, n] < 0.12 or bool(truncated[row, n])
        reward = random.normal(0, 2, (rows, steps)).astype(np.float32)
        reward[is_first[:, 1:]] = 0.0
        return History(
            observation=np.arange(steps + 1, dtype=np.float32) + 100 * (1 + np.arange(rows)[:, None]),
            is_first=is_first,
            action=random.integers(0, ACTIONS, (rows, steps)),
            logits=random.normal(0, 0.5, (rows, steps, ACTIONS)).astype(np.float32),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
        )

    def chunk(self, number: int, spec: RunSpec) -> Chunk:
        """Chunk `number` of all rows, as inference cuts it."""
        unroll, stack, rows = spec.unroll, spec.network.frame_stack, len(self.action)
        start, stop = number * unroll, (number + 1) * unroll
        before = max(0, start - 1)
        has_before = (start > 0) & ~self.is_first[:, start]
        steps = slice(start, stop)
        return replace(
            make_chunk(spec=spec, rows=rows, number=number),
            observation={"counter": self.observation[:, start : stop + 1].astype(np.float32)},
            history={} if stack == 1 else {"counter": self.frames(start, stack)[:, :-1]},
            is_first=self.is_first[:, start : stop + 1],
            action=self.action[:, steps],
            reward=self.reward[:, steps],
            terminated=self.terminated[:, steps],
            truncated=self.truncated[:, steps],
            previous_action=np.where(has_before, self.action[:, before], 0),
            previous_reward=np.where(has_before, self.reward[:, before], 0).astype(np.float32),
            behaviour_logits=self.logits[:, steps],
            state=(self.counts(start - 1)[:, None] if start else np.zeros((rows, 1), np.float32),),
        )

    def episode_start(self, row: int, n: int) -> int:
        """The time of the first observation of the episode that observation `n` is in."""
        while n > 0 and not self.is_first[row, n]:
            n -= 1
        return n

    def counts(self, n: int) -> Array:
        """[B] float32: how many observations of its episode each row has seen with the `n`-th."""
        return np.array([n - self.episode_start(row, n) + 1 for row in range(len(self.action))], np.float32)

    def frames(self, n: int, stack: int) -> Array:
        """[B, S]: the last observations with the `n`-th, zeros before the episode."""
        return np.array(
            [
                [
                    self.observation[row, m] if m >= self.episode_start(row, n) else 0.0
                    for m in range(n - stack + 1, n + 1)
                ]
                for row in range(len(self.action))
            ],
            np.float32,
        )

    def value(self, n: int, stack: int) -> Array:
        """[B]: what the counting network's baseline is at the `n`-th observation."""
        first = self.is_first[:, n] | (n == 0)
        action = np.where(first, 0, self.action[:, max(0, n - 1)])
        reward = np.where(first, 0, self.reward[:, max(0, n - 1)].clip(-REWARD_CLIP, REWARD_CLIP))
        arguments = (self.counts(n), self.frames(n, stack), action, reward)
        return mixed(*(torch.from_numpy(np.asarray(each)) for each in arguments)).numpy()
