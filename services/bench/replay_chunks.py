"""Real chunks of an environment played at random, as inference would cut them; knows no service."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.actor.environments import GroupMaker
from services.actor.stepping import SteppedGroup, Transition
from shared.networks.build import build_network
from shared.run_spec import own_spec
from shared.specs import RunSpec
from shared.types import Array, Chunk, ChunkHeader

RUN_ID = "bench"
STREAM_ID = "stream-0000000000"


class Recorder:
    """One group of environments, and the chunks that its random play makes: those of one stream."""

    def __init__(self, env: str, group_size: int, settings: Any, *, seed: int = 0) -> None:
        """Makes the environments. `settings` are those of an R2D2 agent. Raises UnsupportedEnvironment."""
        self._random = np.random.default_rng(seed)
        self._group = SteppedGroup(
            GroupMaker(env=env, group_size=group_size), seeds=np.random.SeedSequence(seed)
        )
        self.spec: RunSpec = own_spec(settings, self._group.spec)
        leaves = build_network(self.spec).initial_state(1)
        self.state_shapes = [(tuple(leaf.shape[1:]), "float32") for leaf in leaves]
        self._task = env

    def close(self) -> None:
        """Ends the environments."""
        self._group.close()

    def chunks(self) -> Iterator[Chunk]:
        """The next chunk, for ever; frames of an earlier episode are not blanked in its history."""
        spec, rows, steps = self.spec, self._group.size, self.spec.unroll
        last = self._group.reset()
        before = {
            leaf.name: np.zeros((rows, spec.network.frame_stack - 1, *leaf.shape), leaf.dtype)
            for leaf in spec.environment.observation
        }
        number = 0
        while True:
            action = self._random.integers(spec.environment.num_actions, size=(steps, rows))
            seen = [last, *(self._group.step(each) for each in action)]
            chunk = self._chunk(number, seen, np.ascontiguousarray(action.T), before)
            yield chunk
            before = {
                name: np.concatenate([before[name], frames[:, :steps]], axis=1)[:, steps:].copy()
                for name, frames in chunk.observation.items()
            }
            last, number = seen[-1], number + 1

    def _chunk(
        self, number: int, seen: list[Transition], action: NDArray[np.int64], history: dict[str, Array]
    ) -> Chunk:
        rows, steps = action.shape

        def joined(values: list[bytes], dtype: Any, shape: tuple[int, ...] = ()) -> Array:
            array: Array = np.frombuffer(b"".join(values), dtype).reshape(len(values), rows, *shape)
            return np.ascontiguousarray(array.swapaxes(0, 1))

        return Chunk(
            header=ChunkHeader(
                run_id=RUN_ID,
                stream_id=STREAM_ID,
                actor_id="bench",
                task=self._task,
                network_hash=self.spec.network_hash,
                number=number,
                group_size=rows,
                first_row=0,
            ),
            observation={
                leaf.name: joined([each.observation[i] for each in seen], leaf.dtype, leaf.shape)
                for i, leaf in enumerate(self.spec.environment.observation)
            },
            history={name: each for name, each in history.items() if each.shape[1]},
            is_first=joined([each.is_first for each in seen], bool),
            action=action,
            reward=joined([each.reward for each in seen[1:]], np.float32),
            terminated=joined([each.terminated for each in seen[1:]], bool),
            truncated=joined([each.truncated for each in seen[1:]], bool),
            previous_action=np.zeros(rows, np.int64),
            previous_reward=np.zeros(rows, np.float32),
            td_errors=np.abs(self._random.standard_normal((rows, steps), np.float32)),
            state=tuple(
                self._random.standard_normal((rows, *shape), np.float32) for shape, _ in self.state_shapes
            ),
            weights_version=np.ones(steps, np.int64),
            weights_update=np.ones(steps, np.int64),
        )
