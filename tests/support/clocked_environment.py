"""`Clocked-v0`: CartPole that writes down when it was stepped; importing this module registers it."""

import os
import time
from array import array
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from numpy.typing import NDArray


class ClockedEnvironment(CartPoleEnv):
    """Takes `pace_seconds` for a step, so that a few of them leave the processor free.

    Each instance appends the time of each step (monotonic seconds, a double) to a file of its own in
    `directory`, named by process and instance.
    """

    def __init__(self, *, directory: str, pace_seconds: float = 0.002) -> None:
        super().__init__()
        self._pace_seconds = pace_seconds
        path = Path(directory) / f"{os.getpid()}-{id(self)}.times"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def step(self, action: Any) -> tuple[NDArray[np.float32], Any, bool, bool, dict[str, Any]]:
        time.sleep(self._pace_seconds)
        os.write(self._file, array("d", [time.monotonic()]).tobytes())
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def step_times(directory: Path, pid: int) -> list[NDArray[np.float64]]:
    """The times of the steps of each environment of process `pid`."""
    found = sorted(directory.glob(f"{pid}-*.times"))
    return [np.frombuffer(data[: len(data) // 8 * 8]) for data in (path.read_bytes() for path in found)]


gymnasium.register("Clocked-v0", entry_point=f"{__name__}:ClockedEnvironment", max_episode_steps=500)
