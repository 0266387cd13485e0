"""What a run's environment and agent look like, as plain data that travels as JSON.

Actors derive the environment's spec from its spaces; inference completes it to the run's spec; every
other service builds from that. Knows neither gymnasium nor torch.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import orjson

from shared.errors import ConfigurationError

SPEC_FORMAT_VERSION = 1

Agent = Literal["vtrace", "r2d2"]


@dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """One array of an observation: dtype, shape and bounds of a single environment's value.

    `low` and `high` hold one number when all elements share it, else one per element in C order; `n` is
    the number of values of a Discrete space, else 0.
    """

    name: str
    dtype: str  # numpy name: "uint8", "float32", "int64" …
    shape: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one environment's value."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)

    def __str__(self) -> str:
        bounds = f"n={self.n}" if self.n else f"[{_span(self.low)}, {_span(self.high)}]"
        return f"{self.name}: {self.dtype}{list(self.shape)} {bounds}"


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """Observation leaves in wire order, and the number of discrete actions (int64, 0-based)."""

    observation: tuple[LeafSpec, ...]
    num_actions: int

    def difference(self, other: "EnvironmentSpec") -> str | None:
        """Words for the first difference between this (the run's) and `other` (a newcomer's), or None."""
        if self.num_actions != other.num_actions:
            return f"the run has {self.num_actions} actions, this environment {other.num_actions}"
        mine, theirs = ({leaf.name: leaf for leaf in spec.observation} for spec in (self, other))
        for name in mine.keys() | theirs.keys():
            if mine.get(name) != theirs.get(name):
                here, there = (leaves.get(name, f"without {name!r}") for leaves in (mine, theirs))
                return f"observation is {there}; the run's is {here}"
        if self != other:
            return "the observation leaves stand in another order than the run's"
        return None


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Which network, as chosen by the user; with the environment's spec it decides every weight's shape."""

    name: str  # mlp, nature, impala_shallow, impala_deep, or module:Class
    lstm_size: int = 0  # 0: no LSTM
    frame_stack: int = 1
    hidden_sizes: tuple[int, ...] = (64, 64)  # of the MLP
    dueling_size: int = 0  # units of the hidden layer in each of R2D2's two heads; 0: none


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What inference and the learner of one run must agree on."""

    environment: EnvironmentSpec
    network: NetworkSpec
    agent: Agent
    unroll: int  # T, steps of a chunk
    reward_clip: float  # rewards are clipped to ±this for training and as network input; 0: not clipped
    discount: float = 0.0  # of R2D2's TD errors; 0 for V-trace
    n_steps: int = 0  # of R2D2's TD errors; 0 for V-trace

    @property
    def network_hash(self) -> str:
        """Hex digest of everything that decides the network's weights and inputs."""
        network = asdict(self.network)
        if not network["dueling_size"]:
            del network["dueling_size"]  # as it was before there was one
        data = [asdict(self.environment), network, self.agent, self.reward_clip]
        return hashlib.sha256(_dumps(data)).hexdigest()[:16]

    def to_json(self) -> bytes:
        """The spec as JSON, as it lies in the run's key-value bucket and in checkpoints."""
        return _dumps({"format_version": SPEC_FORMAT_VERSION, **asdict(self)})

    @staticmethod
    def from_json(data: bytes) -> "RunSpec":
        """Raises ConfigurationError when `data` is no run spec of this format version."""
        try:
            raw = orjson.loads(data)
            if raw["format_version"] != SPEC_FORMAT_VERSION:
                raise ConfigurationError(
                    f"run spec has format version {raw['format_version']}, this is {SPEC_FORMAT_VERSION}"
                )
            environment, network = raw["environment"], raw["network"]
            return RunSpec(
                environment=EnvironmentSpec(
                    observation=tuple(_leaf(leaf) for leaf in environment["observation"]),
                    num_actions=environment["num_actions"],
                ),
                network=NetworkSpec(**{**network, "hidden_sizes": tuple(network["hidden_sizes"])}),
                agent=raw["agent"],
                unroll=raw["unroll"],
                reward_clip=raw["reward_clip"],
                discount=raw.get("discount", 0.0),
                n_steps=raw.get("n_steps", 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"not a run spec: {error!r}") from error

    def disagreement(self, other: "RunSpec") -> str | None:
        """Words for the first setting in which `other` differs from this (the run's), or None."""
        for name in ("agent", "unroll", "reward_clip", "discount", "n_steps"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {getattr(other, name)}, the run's is {getattr(self, name)}"
        for name, mine in asdict(self.network).items():
            theirs = getattr(other.network, name)
            if theirs != mine:
                return f"network {name} is {theirs}, the run's is {mine}"
        return self.environment.difference(other.environment)


def _leaf(raw: dict[str, Any]) -> LeafSpec:
    return LeafSpec(
        name=raw["name"],
        dtype=np.dtype(raw["dtype"]).name,
        shape=tuple(raw["shape"]),
        low=tuple(float(x) for x in raw["low"]),
        high=tuple(float(x) for x in raw["high"]),
        n=raw["n"],
    )


def _dumps(value: Any) -> bytes:
    return orjson.dumps(_finite(value), option=orjson.OPT_SORT_KEYS)


def _finite(value: Any) -> Any:
    """`value` with infinities as the strings "inf" and "-inf", which JSON cannot say as numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def _span(bounds: tuple[float, ...]) -> str:
    return f"{bounds[0]:g}" if len(bounds) == 1 else f"{min(bounds):g}…{max(bounds):g}"
