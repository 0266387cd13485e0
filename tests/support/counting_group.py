"""A group of counting environments as inference sees it, with random ends, and what its chunks must hold.

Emulates the wire directly, with every kind of end: terminated, truncated, terminated without a reset (a lost
life) and a reset out of nowhere (a crashed environment).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from shared.types import Array, Chunk
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION, to_proto_observation
from tests.support.counting import Q_SCALE
from tests.support.counting_environment import NUM_ACTIONS, reward_of
from tests.support.returns import td_errors

LEAF = "observation"
ENVIRONMENT = EnvironmentSpec(
    observation=(LeafSpec(name=LEAF, dtype="float32", shape=(3,), low=(0.0,), high=(2.0**20,)),),
    num_actions=NUM_ACTIONS,
)
NETWORK = "tests.support.counting:CountingNetwork"
Q_NETWORK = "tests.support.counting:CountingQNetwork"


def counting_spec(
    *, unroll: int = 5, frame_stack: int = 1, reward_clip: float = 0.0, agent: Agent = "vtrace"
) -> RunSpec:
    """The run spec of a counting network on the counting environment."""
    is_q = agent == "r2d2"
    return RunSpec(
        environment=ENVIRONMENT,
        network=NetworkSpec(name=Q_NETWORK if is_q else NETWORK, frame_stack=frame_stack),
        agent=agent,
        unroll=unroll,
        reward_clip=reward_clip,
        discount=0.9 if is_q else 0.0,
        n_steps=3 if is_q else 0,
    )


class CountingGroup:
    """`B` environments in lockstep; what came and went is kept by time: `observations[t]`, `actions[t]` …

    `rewards[t]`, `terminated[t]` and `truncated[t]` came with observation t, so they followed action t − 1.
    """

    def __init__(
        self, rows: int, *, seed: int = 0, stream_id: str = "s1", actor_id: str = "a", role: str = "train"
    ) -> None:
        self.rows = rows
        self.stream_id, self.actor_id, self.role = stream_id, actor_id, role
        self._rng = np.random.default_rng(seed)
        self._instances = 1 + (100 * seed + np.arange(rows)) % 500
        self._episodes = np.zeros(rows, np.int64)
        self._steps = np.zeros(rows, np.int64)
        self._reset_next = np.ones(rows, np.bool_)
        self.observations: list[Array] = []  # [B, 3]
        self.rewards: list[Array] = []
        self.terminated: list[Array] = []
        self.truncated: list[Array] = []
        self.is_first: list[Array] = []
        self.actions: list[Array] = []

    def hello(self, *, run_id: str, **changes: Any) -> bytes:
        """The stream's first message; `changes` replace fields of the Hello."""
        fields: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "run_id": run_id,
            "actor_id": self.actor_id,
            "stream_id": self.stream_id,
            "group_size": self.rows,
            "role": pb.ROLE_EVAL if self.role == "eval" else pb.ROLE_TRAIN,
            "task": "Counting-v0",
            "observation": to_proto_observation(ENVIRONMENT),
            "action": pb.DiscreteActionSpec(n=NUM_ACTIONS),
        }
        return pb.ActRequest(hello=pb.Hello(**{**fields, **changes})).SerializeToString()

    def advance(self) -> None:
        """One step of every environment with the newest actions, or the first observations."""
        rewards = np.zeros(self.rows, np.float32)
        first = self._reset_next.copy()
        for row in np.flatnonzero(~first):
            rewards[row] = reward_of(self.observations[-1][row], int(self.actions[-1][row]))
        self._steps = np.where(first, 1, self._steps + 1)
        self._episodes += first
        chance = self._rng.random((4, self.rows))
        terminated = ~first & (chance[0] < 0.12)
        truncated = ~first & ~terminated & (chance[1] < 0.08)
        life_lost = ~first & ~truncated & (chance[2] < 0.1)
        crashed = ~first & ~life_lost & (chance[3] < 0.03)
        self._reset_next = terminated | truncated | crashed
        self.observations.append(
            np.stack([self._instances, self._episodes, self._steps], axis=1).astype(np.float32)
        )
        self.rewards.append(rewards)
        self.terminated.append(terminated | life_lost)
        self.truncated.append(truncated)
        self.is_first.append(first)

    def step(self, **changes: Any) -> bytes:
        """The newest observations as a Step; `changes` replace its fields."""
        fields: dict[str, Any] = {
            "sequence": len(self.observations) - 1,
            "observation": [self.observations[-1].astype("<f4").tobytes()],
            "reward": self.rewards[-1].astype("<f4").tobytes(),
            "terminated": self.terminated[-1].astype(np.uint8).tobytes(),
            "truncated": self.truncated[-1].astype(np.uint8).tobytes(),
            "is_first": self.is_first[-1].astype(np.uint8).tobytes(),
        }
        return pb.ActRequest(step=pb.Step(**{**fields, **changes})).SerializeToString()

    def take(self, response: bytes) -> pb.Actions:
        """Keeps the actions of a response to the newest step."""
        actions = pb.ActResponse.FromString(response).actions
        assert actions.sequence == len(self.observations) - 1
        self.actions.append(np.frombuffer(actions.action, "<i8"))
        assert self.actions[-1].shape == (self.rows,)
        return actions

    def environment_steps(self, start: int, stop: int) -> int:
        """Steps from observation `start` to observation `stop` that are no resets."""
        return int(sum((~first).sum() for first in self.is_first[start + 1 : stop + 1]))

    def finished_episodes(self) -> list[tuple[int, float, int]]:
        """(row, return, length) of every episode that ended and was followed by another, sorted."""
        finished = []
        for row in range(self.rows):
            total, length = 0.0, 0
            for t in range(len(self.observations)):
                if self.is_first[t][row]:
                    if t and (self.terminated[t - 1] | self.truncated[t - 1])[row]:
                        finished.append((row, total, length))
                    total, length = 0.0, 0
                else:
                    total, length = total + float(self.rewards[t][row]), length + 1
        return sorted(finished)


def assert_chunk_is_right(chunk: Chunk, group: CountingGroup, spec: RunSpec) -> None:
    """Compares every field of a (part of a) chunk with what the group's history says by definition."""
    begin = chunk.header.number * spec.unroll
    assert (chunk.header.stream_id, chunk.header.actor_id) == (group.stream_id, group.actor_id)
    assert chunk.header.group_size == group.rows
    assert chunk.header.network_hash == spec.network_hash
    for index in range(chunk.rows):
        _assert_row_is_right(chunk, index, group, chunk.header.first_row + index, begin, spec)


def _assert_row_is_right(
    chunk: Chunk, index: int, group: CountingGroup, row: int, begin: int, spec: RunSpec
) -> None:
    unroll, stack = spec.unroll, spec.network.frame_stack
    times = range(begin, begin + unroll)
    equal = np.testing.assert_array_equal
    equal(chunk.observation[LEAF][index], [group.observations[t][row] for t in [*times, begin + unroll]])
    equal(chunk.is_first[index], [group.is_first[t][row] for t in [*times, begin + unroll]])
    equal(chunk.action[index], [group.actions[t][row] for t in times])
    for name in ("reward", "terminated", "truncated"):
        record = group.rewards if name == "reward" else getattr(group, name)
        equal(getattr(chunk, name)[index], [record[t + 1][row] for t in times], err_msg=name)
    count, action, reward, frames = seen(group, row, begin, stack)
    equal(chunk.state[0][index], [count])
    assert chunk.previous_action[index] == action
    assert chunk.previous_reward[index] == reward
    if stack > 1:
        equal(chunk.history[LEAF][index], frames[:-1])
    else:
        assert chunk.history == {}
    logits = [told_logits(group, row, t, spec) for t in [*times, begin + unroll]]
    if spec.agent == "r2d2":
        assert chunk.behaviour_logits is None
        _assert_td_errors_are_right(chunk, index, [each / Q_SCALE for each in logits], spec)
        return
    assert chunk.td_errors is None
    assert chunk.behaviour_logits is not None
    for offset, t in enumerate(times):
        assert chunk.action[index, offset] == logits[offset].argmax()
        equal(chunk.behaviour_logits[index, offset], logits[offset], err_msg=f"row {row} time {t}")


def _assert_td_errors_are_right(
    chunk: Chunk, index: int, q_values: list[NDArray[np.float32]], spec: RunSpec
) -> None:
    """From Q-values [A] at T + 1 times by definition, and a chunk whose other fields were compared before."""
    assert chunk.td_errors is not None
    clip = spec.reward_clip or np.inf
    values = [each.tolist() for each in q_values]
    expected = td_errors(
        online_q=values,
        target_q=values,
        actions=chunk.action[index].tolist(),
        rewards=chunk.reward[index].clip(-clip, clip).tolist(),
        discounts=np.where(chunk.terminated[index], 0.0, spec.discount).tolist(),
        reset_steps=chunk.is_first[index, 1:].tolist(),
        n=spec.n_steps,
    )
    np.testing.assert_allclose(chunk.td_errors[index], expected, rtol=2e-6, atol=2e-5)


def told_logits(group: CountingGroup, row: int, time: int, spec: RunSpec) -> NDArray[np.float32]:
    """[A] what the counting network says at `time` by definition."""
    stack, clip, actions = spec.network.frame_stack, spec.reward_clip, spec.environment.num_actions
    count, action, reward, frames = seen(group, row, time, stack)
    newest = group.observations[time][row]
    logits = np.zeros(actions, np.float32)
    logits[:6] = [count, *newest, action, max(-clip, min(clip, reward)) if clip else reward]
    logits[6 : 6 + stack] = [frame[2] for frame in frames]
    logits[int(newest[0] + count) % actions] += 65536.0
    return logits


def seen(
    group: CountingGroup, row: int, time: int, stack: int
) -> tuple[int, int, float, list[NDArray[np.float32]]]:
    """What the policy must see at `time` by definition: count, previous action and reward, stacked frames."""
    start = max(t for t in range(time + 1) if group.is_first[t][row])
    frames = [
        group.observations[t][row] if t >= start else np.zeros(3, np.float32)
        for t in range(time - stack + 1, time + 1)
    ]
    if time == start:
        return 0, 0, 0.0, frames
    return time - start, int(group.actions[time - 1][row]), float(group.rewards[time][row]), frames
