"""A trained policy as a Python function::

policy = load_policy("runs/cartpole")
observation, _ = env.reset()
done, reward = False, 0.0
while not done:
    action = policy(observation, reward=reward)
    observation, reward, terminated, truncated, _ = env.step(action)
    done = terminated or truncated
policy.reset()  # before the next episode
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from shared.algorithms.exploration import EVALUATION_EPSILON
from shared.checkpoints import Checkpoint, checkpoint_at
from shared.errors import RunError
from shared.networks.build import build_network
from shared.networks.leaves import torch_dtype
from shared.networks.precision import resolve_device
from shared.networks.unroll import network_input, next_history
from shared.specs import LeafSpec, RunSpec
from shared.types import Array

_MOST = float(np.finfo(np.float32).max)  # what networks compute in


class Policy:
    """Acts in one environment; remembers recurrent state, frame history and its previous action."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device, seed: int | None = None) -> None:
        self._spec = checkpoint.spec
        self._device = device
        self._network = build_network(checkpoint.spec)
        try:
            self._network.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise RunError(f"{checkpoint.path}: weights of another network: {words}") from error
        self._network.to(device).eval()
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self.reset()

    @property
    def spec(self) -> RunSpec:
        """The run's spec: environment, network, agent.

        `discount` and `n_steps` are R2D2's; for V-trace they are 0, whatever it was trained with.
        """
        return self._spec

    def reset(self) -> None:
        """Forgets the episode: the next observation is an episode's first."""
        self._starts = True
        self._state = self._network.initial_state(1)
        self._previous_action = torch.zeros(1, dtype=torch.int64, device=self._device)
        stacked = self._spec.network.frame_stack - 1
        self._history = {
            leaf.name: torch.zeros(
                (1, stacked, *leaf.shape), dtype=torch_dtype(leaf.dtype), device=self._device
            )
            for leaf in (self._spec.environment.observation if stacked else ())
        }

    def __call__(
        self,
        observation: Any,
        *,
        reward: float = 0.0,
        is_first: bool | None = None,
        greedy: bool | None = None,
    ) -> int:
        """The action for `observation`.

        Args:
            observation: as the Gymnasium environment gives it, unbatched: an array, or nested dicts and
                tuples of arrays. Of Discrete spaces give the value minus the space's `start`.
            reward: raw, what followed the previous action. Of the networks that come with the project those
                with an LSTM look at it; one of your own may, too.
            is_first: the observation starts an episode; None: it does after `reset` and at the first call.
            greedy: True: the best action. False: one sampled from V-trace's policy; for R2D2 the best one, or
                any with probability ε = 0.001. None: as the agent is judged (V-trace True, R2D2 False).

        Returns:
            0-based; add `env.action_space.start` where that is not 0.

        Raises:
            ValueError: the observation is not as the environment it was trained on gives it, or the reward is
                no finite number.
        """
        raw_reward = _number(reward)
        starts = self._starts if is_first is None else is_first
        with torch.inference_mode():
            inputs = network_input(
                frames={
                    leaf.name: torch.from_numpy(leaf_value(observation, leaf)).to(self._device)[None, None]
                    for leaf in self._spec.environment.observation
                },
                history=self._history,
                is_first=torch.tensor([[starts]], device=self._device),
                previous_action=self._previous_action,
                previous_reward=torch.tensor([raw_reward], dtype=torch.float32, device=self._device),
                reward_clip=self._spec.reward_clip,
            )
            output, self._state = self._network(inputs, self._state)
            self._history = {name: next_history(inputs.observation[name][0]) for name in self._history}
            is_q = self._spec.agent == "r2d2"
            choose = self._explored if is_q else self._chosen
            scores = output.q_values if is_q else output.policy_logits
            self._previous_action = choose(scores[0], greedy)
        self._starts = False
        return int(self._previous_action)

    def _explored(self, q_values: Tensor, greedy: bool | None) -> Tensor:
        best = q_values.argmax(-1)
        if greedy or torch.rand(1, generator=self._generator, device=self._device) >= EVALUATION_EPSILON:
            return best
        return torch.randint(q_values.shape[-1], (1,), generator=self._generator, device=self._device)

    def _chosen(self, logits: Tensor, greedy: bool | None) -> Tensor:
        if greedy is not False:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator).squeeze(-1)


def load_policy(run_dir: str | Path, *, device: str = "cpu", seed: int | None = None) -> Policy:
    """The policy of the newest checkpoint in `run_dir`, in float32 on `device` (cpu, cuda, cuda:N, auto).

    `run_dir` may also be the path of one checkpoint, which needs nothing else of its run. `seed` is for
    sampled and random actions. Raises RunError when there is no checkpoint that can be used, and
    ConfigurationError when its network cannot be built (a network of your own must be importable).
    """
    return Policy(checkpoint_at(Path(run_dir)), device=resolve_device(device), seed=seed)


def leaf_value(observation: Any, leaf: LeafSpec) -> Array:
    """The part of a single environment's observation that `leaf` names, in its dtype and shape.

    Raises ValueError when it is not there or has another shape or an impossible value, such as NaN.
    """
    part = _part(observation, leaf.name)
    try:
        value = np.asarray(part)
    except (TypeError, ValueError) as error:
        raise ValueError(f"observation {leaf.name!r} must be {leaf.dtype}: {error}") from error
    if value.shape != leaf.shape:
        here, expected = list(value.shape), list(leaf.shape)
        batch = (
            "; a policy is for one environment: take one for each" if value.shape[1:] == leaf.shape else ""
        )
        raise ValueError(
            f"observation {leaf.name!r} of one environment must be {expected}, not {here}{batch}"
        )
    if not (np.can_cast(value.dtype, leaf.dtype, "same_kind") or _are_integers(value.dtype, leaf.dtype)):
        raise ValueError(f"observation {leaf.name!r} must be {leaf.dtype}, not {value.dtype}")
    with np.errstate(over="ignore"):  # it is an infinity then, which is refused below
        converted = value.astype(leaf.dtype)
    if converted.dtype.kind in "iu" and not np.array_equal(converted, value):
        raise ValueError(f"observation {leaf.name!r} has values beyond {leaf.dtype}")
    if leaf.n and not 0 <= converted < leaf.n:
        raise ValueError(f"observation {leaf.name!r} must be 0 to {leaf.n - 1}, not {value}")
    if converted.dtype.kind == "f":
        refused = ~(np.abs(converted.astype(np.float64)) <= _MOST)
        if refused.any():
            kind = "float16" if leaf.dtype == "float16" else "float32"
            first = value[refused].flat[0]
            raise ValueError(f"observation {leaf.name!r} must be finite as {kind}, not {first}")
    return np.array(converted, order="C")


def _are_integers(*dtypes: DTypeLike) -> bool:
    """Signed or not: Python's own become int64. Their values are compared."""
    return all(np.issubdtype(dtype, np.integer) for dtype in dtypes)


def _number(reward: Any) -> float:
    """`reward`, also of an array of one. Raises ValueError when it is no number, or not finite as float32."""
    try:
        number = float(np.asarray(reward, np.float64).reshape(()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward must be one number, not {reward!r}") from error
    if not abs(number) <= _MOST:
        raise ValueError(f"reward must be finite as float32, not {number}")
    return number


def _part(observation: Any, name: str) -> Any:
    """Follows a leaf's name ("observation" for the root, keys and indices joined with "/")."""
    if name == "observation" and not (isinstance(observation, Mapping) and name in observation):
        return observation
    part, rest = observation, name
    while rest:
        key, part = _step(part, rest, name)
        rest = rest[len(key) + 1 :]
    return part


def _step(part: Any, rest: str, name: str) -> tuple[str, Any]:
    """The longest key of `part` that `rest` begins with (keys may hold slashes), and what is there."""
    if isinstance(part, Mapping):
        keys = {str(key): value for key, value in part.items()}
    elif isinstance(part, (tuple, list)):
        keys = {str(index): value for index, value in enumerate(part)}
    else:
        keys = {}
    found = [key for key in keys if f"{rest}/".startswith(f"{key}/")]
    if not found:
        raise ValueError(f"the observation has no {name!r}, on which the policy was trained")
    key = max(found, key=len)
    return key, keys[key]
