"""What every network must do, checked on a network of one's own as on those that come with the project::

check_network(Net(environment=environment, network=network), environment, network, agent="vtrace")
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.networks.calls import error_words
from shared.networks.interface import OUTPUTS, NetworkInput, NetworkOutput, Output, QOutput, State
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec

_STEPS, _BATCH = 4, 3  # few, as each run of a network of its own begins with this
_SPAN = 10.0  # where a space is unbounded, values are drawn from about this range
_RESET_RATE = 0.3
_MASKED = 1e6  # the logits of actions that cannot be taken lie below −1e6
_NO_KERNEL = "could not create a primitive"  # torch's words where a CPU lacks the instructions


def check_network(
    network: nn.Module,
    environment: EnvironmentSpec,
    network_spec: NetworkSpec,
    *,
    agent: Agent = "vtrace",
    bfloat16: bool = True,
) -> None:
    """Raises AssertionError with words for the first point in which `network` breaks the interface.

    `agent` is whose network it is: vtrace needs `NetworkOutput`, r2d2 `QOutput`. It runs on the device of the
    network's parameters with random observations, with `bfloat16` also under autocast; weights stay as they
    are.
    """
    if not isinstance(network, nn.Module):
        raise AssertionError(f"a network is an object of torch.nn.Module, not {type(network).__name__}")
    checked = CheckedNetwork(network, environment.num_actions, agent)
    device = next(network.parameters(), torch.zeros(())).device
    generator = torch.Generator().manual_seed(0)
    inputs = random_input(
        environment, network_spec, steps=_STEPS, batch=_BATCH, generator=generator, device=device
    )
    with torch.no_grad():
        _check_initial_state(checked, device)
        _check_inputs_stay(checked, inputs)
        if bfloat16:
            _check_autocast(checked, inputs)
        _check_time(checked, inputs)
        _check_resets(checked, inputs)
        _check_rows(checked, inputs)
        _check_state_dict(checked, inputs)
    _check_gradients(checked, inputs)


class CheckedNetwork:
    """`network` as inference and the learner call it.

    Each call raises AssertionError, in words, where the network raises or gives anything that cannot be what
    `agent` needs: another kind, number, shape or dtype, or a number that is not finite.
    """

    def __init__(self, network: nn.Module, num_actions: int, agent: Agent) -> None:
        self.network = network
        self._num_actions = num_actions
        self._agent = agent

    def initial_state(self, batch: int) -> State:
        """The network's, for `batch` rows."""
        if not callable(getattr(self.network, "initial_state", None)):
            raise AssertionError(f"{type(self.network).__name__} has no initial_state(batch_size)")
        with _saying("initial_state raises"):
            state: State = self.network.initial_state(batch)  # type: ignore[operator]
        check_state(state, batch)
        return state

    def __call__(self, inputs: NetworkInput, state: State, *, where: str = "") -> tuple[Output, State]:
        """As `Network.forward`; the words of what is wrong begin with `where`."""
        with _saying(f"{where}forward raises"):
            result = self.network(inputs, state)
        if isinstance(result, (NetworkOutput, QOutput)) or not isinstance(result, tuple) or len(result) != 2:
            kind = type(result).__name__
            raise AssertionError(f"{where}forward must return the output and the new state, not {kind} alone")
        output = _named_output(result[0], self._agent)
        lead = tuple(inputs.is_first.shape)
        for name, value in zip(output._fields, output, strict=True):
            shape = lead if name == "baseline" else (*lead, self._num_actions)
            _check_tensor(f"{where}{name}", value, shape, lead)
        _check_next_state(state, result[1], lead, where)
        return output, result[1]


def random_input(
    environment: EnvironmentSpec,
    network_spec: NetworkSpec,
    *,
    steps: int,
    batch: int,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> NetworkInput:
    """Random inputs [steps, batch] within the spaces' bounds, with episodes that start at random."""
    stack = (network_spec.frame_stack,) if network_spec.frame_stack > 1 else ()
    is_first = torch.rand(steps, batch, generator=generator) < _RESET_RATE
    action = torch.randint(environment.num_actions, (steps, batch), generator=generator)
    reward = torch.randn(steps, batch, generator=generator)
    return NetworkInput(
        observation={
            leaf.name: _random_leaf(leaf, (steps, batch, *stack), generator).to(device)
            for leaf in environment.observation
        },
        previous_action=action.masked_fill(is_first, 0).to(device),
        previous_reward=reward.masked_fill(is_first, 0).to(device),
        is_first=is_first.to(device),
    )


def check_state(state: State, batch: int) -> None:
    """Raises AssertionError, in words, where what initial_state(batch) returned is no state."""
    if not isinstance(state, tuple):
        raise AssertionError(f"initial_state must return a tuple of tensors, not {type(state).__name__}")
    for index, leaf in enumerate(state):
        if not isinstance(leaf, Tensor):
            raise AssertionError(f"state leaf {index} is no tensor but {type(leaf).__name__}")
        if leaf.dtype != torch.float32:
            raise AssertionError(f"state leaf {index} must be float32, not {leaf.dtype}")
        if leaf.shape[:1] != (batch,):
            words = f"must be [B, …] with B = {batch}, not {list(leaf.shape)}"
            raise AssertionError(f"state leaf {index} {words}")


def _random_leaf(leaf: LeafSpec, lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
    shape = (*lead, *leaf.shape)
    if leaf.n:
        return torch.randint(leaf.n, shape, generator=generator)
    low, high = _bounds(leaf)
    values = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    if np.dtype(leaf.dtype).kind != "f":
        values = values.round()
    return values.to(getattr(torch, leaf.dtype))


def _bounds(leaf: LeafSpec) -> tuple[Tensor, Tensor]:
    """Of each element, within those of the space, and not far apart where these are."""
    given = (torch.tensor(values, dtype=torch.float64) for values in (leaf.low, leaf.high))
    low, high = (values.expand(math.prod(leaf.shape)).reshape(leaf.shape) for values in given)
    if leaf.dtype == "uint8":
        return low, high
    least = low.clamp(min=-_SPAN)
    least = torch.where(least > high, low.maximum(high - 2 * _SPAN), least)
    return least, (least + 2 * _SPAN).minimum(high)


@contextmanager
def _saying(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what} {error_words(error)}") from error


def _named_output(output: Any, agent: Agent) -> Output:
    """`output`, which may be of any kind that has the fields."""
    wanted = OUTPUTS[agent]
    missing = [field for field in wanted._fields if not hasattr(output, field)]
    if missing:
        kind, words = type(output).__name__, ", ".join(missing)
        raise AssertionError(f"forward returns {kind} without {words}: agent {agent} needs {wanted.__name__}")
    return wanted(*(getattr(output, field) for field in wanted._fields))


def _check_next_state(before: State, after: Any, lead: tuple[int, ...], where: str) -> None:
    if not isinstance(after, tuple):
        kind = type(after).__name__
        raise AssertionError(f"{where}the state that forward returns must be a tuple of tensors, not {kind}")
    if len(after) != len(before):
        raise AssertionError(
            f"{where}the state that forward returns must have the {len(before)} leaves of the initial state, "
            f"not {len(after)}"
        )
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        _check_tensor(f"{where}leaf {index} of the state that forward returns", new, tuple(old.shape), lead)


def _check_initial_state(network: CheckedNetwork, device: torch.device) -> None:
    for index, leaf in enumerate(network.initial_state(_BATCH)):
        assert leaf.device == device, f"state leaf {index} must be on {device}, not on {leaf.device}"
        assert not leaf.any(), f"state leaf {index} must be zeros before an episode's first step"


def _check_autocast(network: CheckedNetwork, inputs: NetworkInput) -> None:
    with torch.autocast(inputs.is_first.device.type, dtype=torch.bfloat16):
        try:
            network(inputs, network.initial_state(_BATCH), where="under bfloat16 autocast, ")
        except AssertionError as error:
            if _NO_KERNEL not in str(error.__cause__):
                raise


def _check_inputs_stay(network: CheckedNetwork, inputs: NetworkInput) -> None:
    """With a state from the midst of an episode, as zeros survive a multiplication, and at its start."""
    inputs = inputs.map(torch.clone)
    for first in (False, True):
        inputs = _masked(inputs._replace(is_first=torch.full_like(inputs.is_first, first)))
        state = network.initial_state(_BATCH)
        for _ in range(2):
            state = _state_after_unchanged_inputs(network, inputs, state)


def _state_after_unchanged_inputs(network: CheckedNetwork, inputs: NetworkInput, state: State) -> State:
    passed = {
        **{f"observation {name}": leaf for name, leaf in inputs.observation.items()},
        "previous_action": inputs.previous_action,
        "previous_reward": inputs.previous_reward,
        "is_first": inputs.is_first,
        **{f"state leaf {index}": leaf for index, leaf in enumerate(state)},
    }
    before = {name: value.clone() for name, value in passed.items()}
    _, after = network(inputs, state)
    for name, value in passed.items():
        assert torch.equal(value, before[name]), f"forward changes its input {name}"
    return after


def _check_time(network: CheckedNetwork, inputs: NetworkInput) -> None:
    whole, last = network(inputs, network.initial_state(_BATCH))
    state = network.initial_state(_BATCH)
    for t in range(_STEPS):
        single, state = network(_slice(inputs, t, t + 1), state)
        _check_close(f"step {t} of an unroll differs from a single step", _steps(whole, t, t + 1), single)
    _check_states("the state after an unroll differs from that after single steps", last, state)


def _check_resets(network: CheckedNetwork, inputs: NetworkInput) -> None:
    start = _STEPS // 2
    first = inputs.is_first.clone()
    first[start] = True
    inputs = _masked(inputs._replace(is_first=first))
    before = _slice(inputs, 0, start)
    disturbed = before._replace(
        observation={name: leaf.roll(1, dims=1) for name, leaf in before.observation.items()},
        previous_reward=before.previous_reward + 1.0,
    )
    words = "is_first does not separate an episode from what was before it: "
    strange = network.initial_state(_BATCH)
    midst = disturbed._replace(is_first=torch.zeros_like(disturbed.is_first))
    for _ in range(2):  # a state that the network comes to, as it may not know what to do with any other
        _, strange = network(midst, strange)
    expected, _ = network(inputs, network.initial_state(_BATCH))
    actual, _ = network(_joined(disturbed, _slice(inputs, start, _STEPS)), strange)
    _check_close(f"{words}step {start} of an unroll", *(_steps(x, start, _STEPS) for x in (expected, actual)))
    single, _ = network(_slice(inputs, start, start + 1), strange)
    _check_close(f"{words}a single step from another state", _steps(expected, start, start + 1), single)


def _check_rows(network: CheckedNetwork, inputs: NetworkInput) -> None:
    """Row 0 keeps its inputs, the others get each other's."""
    order = [0, *range(_BATCH - 1, 0, -1)]
    other = inputs.map(lambda value: value[:, order])
    expected, _ = network(inputs, network.initial_state(_BATCH))
    actual, _ = network(other, network.initial_state(_BATCH))
    _check_close(
        "a row's results depend on other rows", type(expected)(*(x[:, order] for x in expected)), actual
    )
    alone, _ = network(_row(inputs, 0), network.initial_state(1))
    _check_close("a row alone differs from the row in a batch", _columns(expected, 1), alone)


def _check_state_dict(network: CheckedNetwork, inputs: NetworkInput) -> None:
    with _saying("copy.deepcopy of the network raises"):
        other = copy.deepcopy(network)
    for parameter in other.network.parameters():
        parameter.add_(1.0)
    with _saying("load_state_dict raises"):
        other.network.load_state_dict(
            {name: value.clone() for name, value in network.network.state_dict().items()}
        )
    state = network.initial_state(_BATCH)
    _check_close(
        "a network loaded from state_dict differs", network(inputs, state)[0], other(inputs, state)[0]
    )


def _check_gradients(network: CheckedNetwork, inputs: NetworkInput) -> None:
    module = network.network
    module.zero_grad()
    output, _ = network(inputs, network.initial_state(_BATCH))
    with _saying("the backward pass raises"):
        squares = [value.clamp(-_MASKED, _MASKED).square().sum() for value in output]
        torch.stack(squares).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad for name, value in module.named_parameters() if value.requires_grad}
    module.zero_grad()
    assert gradients, "the network has no parameters to learn"
    for name, gradient in gradients.items():
        assert gradient is not None, f"no gradient reaches parameter {name}"
        assert gradient.isfinite().all(), f"the gradient of parameter {name} is not finite"


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], lead: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise AssertionError(f"{name} is no tensor but {type(value).__name__}")
    if tuple(value.shape) != shape:
        of = f"for {lead[0]} steps of {lead[1]} rows"
        raise AssertionError(f"{name} must be {list(shape)}, not {list(value.shape)}, {of}")
    if value.dtype != torch.float32:
        raise AssertionError(f"{name} must be float32, not {value.dtype}")
    if not value.isfinite().all():
        raise AssertionError(f"{name} is not finite")


def _check_close(words: str, expected: Output, actual: Output) -> None:
    for name, x, y in zip(expected._fields, expected, actual, strict=True):
        assert _are_close(x, y), f"{words} ({name}, by {_distance(x, y):.2g})"


def _check_states(words: str, expected: State, actual: State) -> None:
    for index, (x, y) in enumerate(zip(expected, actual, strict=True)):
        assert _are_close(x, y), f"{words} (leaf {index}, by {_distance(x, y):.2g})"


def _are_close(x: Tensor, y: Tensor) -> bool:
    """But for rounding, as large as the numbers that a result is summed up from, those of masks aside."""
    largest = float(x.abs().where(x > -_MASKED, 0.0).max()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol=1e-4, atol=1e-5 * max(1.0, largest))


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max()) if x.numel() else math.nan


def _slice(inputs: NetworkInput, start: int, stop: int) -> NetworkInput:
    return inputs.map(lambda value: value[start:stop])


def _row(inputs: NetworkInput, row: int) -> NetworkInput:
    return inputs.map(lambda value: value[:, row : row + 1])


def _joined(first: NetworkInput, second: NetworkInput) -> NetworkInput:
    return NetworkInput(
        {name: torch.cat([leaf, second.observation[name]]) for name, leaf in first.observation.items()},
        *(torch.cat(pair) for pair in zip(first[1:], second[1:], strict=True)),
    )


def _masked(inputs: NetworkInput) -> NetworkInput:
    return inputs._replace(
        previous_action=inputs.previous_action.masked_fill(inputs.is_first, 0),
        previous_reward=inputs.previous_reward.masked_fill(inputs.is_first, 0),
    )


def _steps(output: Output, start: int, stop: int) -> Output:
    return type(output)(*(value[start:stop] for value in output))


def _columns(output: Output, stop: int) -> Output:
    return type(output)(*(value[:, :stop] for value in output))
