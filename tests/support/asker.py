"""What asks a dispatcher, without a stream."""

import numpy as np

from services.inference.assembler import StepArrays
from tests.support.counting_group import LEAF


class Asker:
    """A group that asks with its own number in every observation."""

    greedy = False
    wants_start = False

    def __init__(self, number: int, rows: int) -> None:
        self.number = number
        self.rows = rows
        self.slots = np.arange(rows) + 100 * number
        self.epsilon = np.zeros(rows, np.float32)

    def step(self) -> StepArrays:
        nothing = np.zeros(self.rows, np.bool_)
        observation = {LEAF: np.full((self.rows, 3), self.number, np.float32)}
        return StepArrays(observation, np.zeros(self.rows, np.float32), nothing, nothing, nothing)
