"""Trajectory chunks for the learner's tests: plausible contents, of any shape."""

import numpy as np

from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec
from shared.types import Chunk, ChunkHeader

VECTOR = LeafSpec(name="observation", dtype="float32", shape=(3,), low=(-1.0,), high=(1.0,))


def make_spec(
    *,
    unroll: int = 4,
    actions: int = 2,
    network: str = "mlp",
    lstm_size: int = 0,
    frame_stack: int = 1,
    hidden_sizes: tuple[int, ...] = (8,),
    observation: tuple[LeafSpec, ...] = (VECTOR,),
    reward_clip: float = 0.0,
) -> RunSpec:
    """The spec of a small run."""
    return RunSpec(
        environment=EnvironmentSpec(observation=observation, num_actions=actions),
        network=NetworkSpec(
            name=network, lstm_size=lstm_size, frame_stack=frame_stack, hidden_sizes=hidden_sizes
        ),
        agent="vtrace",
        unroll=unroll,
        reward_clip=reward_clip,
    )


def make_chunk(
    *,
    spec: RunSpec | None = None,
    rows: int = 2,
    run_id: str = "test",
    stream_id: str = "stream",
    number: int = 0,
    update: int = 0,
    version: int = 1,
    state: tuple[np.ndarray, ...] = (),
    seed: int = 0,
) -> Chunk:
    """A chunk in the middle of an episode, with random observations, actions and logits and no rewards."""
    spec = spec or make_spec()
    random = np.random.default_rng(seed)
    unroll, actions, stack = spec.unroll, spec.environment.num_actions, spec.network.frame_stack

    def leaf(of: LeafSpec, count: int) -> np.ndarray:
        values = random.uniform(0, 255 if of.dtype == "uint8" else 1, (rows, count, *of.shape))
        return values.astype(of.dtype)

    leaves = spec.environment.observation
    return Chunk(
        header=ChunkHeader(
            run_id=run_id,
            stream_id=stream_id,
            actor_id="actor",
            task="task",
            network_hash=spec.network_hash,
            number=number,
            group_size=rows,
            first_row=0,
        ),
        observation={of.name: leaf(of, unroll + 1) for of in leaves},
        history={of.name: leaf(of, stack - 1) for of in leaves} if stack > 1 else {},
        is_first=np.zeros((rows, unroll + 1), bool),
        action=random.integers(0, actions, (rows, unroll)),
        reward=np.zeros((rows, unroll), np.float32),
        terminated=np.zeros((rows, unroll), bool),
        truncated=np.zeros((rows, unroll), bool),
        previous_action=random.integers(0, actions, rows),
        previous_reward=np.zeros(rows, np.float32),
        behaviour_logits=random.normal(size=(rows, unroll, actions)).astype(np.float32),
        state=state,
        weights_version=np.full(unroll, version, np.int64),
        weights_update=np.full(unroll, update, np.int64),
    )
