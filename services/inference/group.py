"""One connected group: what its Steps and answers become; knows no stream, no device and no message queue."""

from typing import Any

import numpy as np

from services.inference.assembler import Assembler, Cut, Origin, StepArrays
from services.inference.dispatcher import Answer
from services.inference.episodes import EpisodeCounter
from services.inference.observations import Observations
from services.inference.session import Introduction, StepReader
from services.inference.slots import Slots
from shared.algorithms.exploration import EVALUATION_EPSILON, epsilon_ladder
from shared.specs import RunSpec
from shared.wire import shared_memory


class Group:
    """Takes `observe` and `act` in turn. An eval group's history becomes no chunks."""

    def __init__(
        self, introduction: Introduction, *, spec: RunSpec, slots: Slots, frames_in_place: bool = False
    ) -> None:
        """`frames_in_place`: the policy gets stacks of frames, where they are, instead of the newest ones."""
        self.introduction = introduction
        self.slots = slots
        self.rows = introduction.group_size
        self.greedy = introduction.role == "eval"
        # [B], R2D2's; the whole ladder, since a group knows nothing of the others
        self.epsilon = np.full(self.rows, EVALUATION_EPSILON) if self.greedy else epsilon_ladder(self.rows)
        self.steps = 0  # environment steps; reset steps are none
        shared = shared_memory.taken(
            introduction.shared_memory,
            introduction.environment,
            group_size=self.rows,
            stream_id=introduction.stream_id,
        )
        self.shares_memory = shared is not None
        self._reader = StepReader(introduction.environment, group_size=self.rows, shared=shared)
        self._episodes = EpisodeCounter(self.rows)
        self._weights_version = 0
        self._frames_in_place = frames_in_place
        self._assembler: Assembler | None = None
        self._observations: Observations | None = None
        if self.greedy:
            self._observations = Observations(spec, self.rows) if frames_in_place else None
        else:
            origin = Origin(
                run_id=introduction.run_id,
                stream_id=introduction.stream_id,
                actor_id=introduction.actor_id,
                task=introduction.task,
                group_size=self.rows,
            )
            self._assembler = Assembler(spec, origin)
            self._observations = self._assembler.observations

    @property
    def wants_start(self) -> bool:
        """Whether the next answer must come with a ChunkStart."""
        return self._assembler is not None and self._assembler.wants_start

    @property
    def unfinished_steps(self) -> int:
        """Environment steps that are lost when the group ends now."""
        return self._assembler.unfinished_steps if self._assembler is not None else 0

    @property
    def sequence(self) -> int:
        """Of the next Step."""
        return self._reader.sequence

    def observe(self, data: bytes) -> tuple[StepArrays, list[dict[str, Any]]]:
        """A Step as the policy needs it, and the episodes it ended. Raises Refusal.

        Its arrays are views, to be copied, save that frames in place stay good until the next step.
        """
        step = self._reader.read(data)
        self.steps += self.rows - int(np.count_nonzero(step.is_first))
        if self._assembler is not None:
            self._assembler.observe(step)
        elif self._observations is not None:
            self._observations.append(step.observation, step.is_first)
        if self._frames_in_place and self._observations is not None:
            step = step._replace(observation=self._observations.stacks())
        ended = self._episodes.observe(
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            is_first=step.is_first,
            weights_version=self._weights_version,
        )
        introduction = self.introduction
        return step, [
            {
                "actor_id": introduction.actor_id,
                "stream_id": introduction.stream_id,
                "task": introduction.task,
                "role": introduction.role,
                "row": episode.row,
                "return": episode.episode_return,
                "length": episode.length,
                "weights_version": episode.weights_version,
            }
            for episode in ended
        ]

    def act(self, answer: Answer) -> Cut | None:
        """Records the answer to the step; returns what it completes."""
        self._weights_version = answer.weights_version
        if self._assembler is None:
            return None
        return self._assembler.act(
            action=answer.action,
            logits=answer.logits,
            weights_version=answer.weights_version,
            weights_update=answer.weights_update,
            start=answer.start,
        )
