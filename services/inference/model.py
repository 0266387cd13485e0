"""The policy on the device, and what it remembers of every environment, by slot.

Runs in the model thread, or where it is quick on the event loop. Knows neither streams nor chunks.
"""

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.inference.assembler import ChunkStart
from services.inference.frames import FrameMemory
from services.inference.graphs import GraphedNetwork
from services.inference.places import Places, remembered_places
from services.inference.quickness import Quickness
from services.inference.staging import Staging
from shared.errors import RunError
from shared.networks.calls import call_network
from shared.networks.interface import Network, NetworkInput, State
from shared.networks.leaves import torch_dtype
from shared.networks.precision import Precision, autocast, uses_bfloat16
from shared.networks.unroll import clip_rewards, previous_inputs
from shared.specs import RunSpec
from shared.types import Array

_LEAST_SLOTS = 64


class PackedBatch(NamedTuple):
    """What the network computes next."""

    staging: Staging
    rows: int
    starts: Array | None  # [R] rows whose ChunkStart is wanted


class Answers(NamedTuple):
    """What the policy says about a batch of `n` rows."""

    action: Array  # [n] int64
    logits: Array  # [n, A] float32; R2D2: Q-values
    start: ChunkStart | None  # of the rows in `starts`
    weights_version: int
    weights_update: int
    seconds: float  # it took, copies to and from the device included


class Model:
    """A network with recurrent state and previous action of every slot, and newest frames if it stacks them.

    A slot's first step must be `is_first`; nothing is cleared when it gets a new owner.
    """

    def __init__(
        self,
        spec: RunSpec,
        network: Network,
        *,
        device: torch.device,
        precision: Precision,
        seed: int | None,
        cuda_graphs: bool = False,
        frames_in_place: bool = False,
    ) -> None:
        """`frames_in_place`: batches bring stacks of frames; otherwise the newest ones, stacked here."""
        self._spec = spec
        self._network = network.to(device).eval()
        self._forward: Callable[[NetworkInput, State], tuple[Any, State]] = (
            GraphedNetwork(self._network, device) if cuda_graphs else self._network
        )
        self._device = device
        self._autocast = autocast(precision, device, network)
        self._in_bfloat16 = uses_bfloat16(precision, device, network)
        self._is_autocast_held = False
        self._quickness = Quickness()
        self._places = remembered_places(device)
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._memory = _Memory(
            spec, network, device, stack=1 if frames_in_place else spec.network.frame_stack
        )
        self.weights_version = 0
        self.weights_update = 0

    @property
    def is_quick(self) -> bool:
        """Whether any thread may `run` it, and one of its own is not worth it."""
        return self._quickness.is_quick and self._device.type == "cpu" and not self._in_bfloat16

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Raises RunError when `weights` are not this network's. Safe in any thread."""
        mine = self._network.state_dict()
        for name in mine.keys() | weights.keys():
            theirs, ours = (tensors.get(name) for tensors in (weights, mine))
            if theirs is None or ours is None or theirs.shape != ours.shape:
                here, there = ("nothing" if each is None else list(each.shape) for each in (ours, theirs))
                raise RunError(f"weights have {there} for {name!r}, the network {here}")

    def load(self, weights: Mapping[str, Tensor], *, version: int, update: int) -> None:
        """Replaces the weights by ones that passed `check`."""
        self.close()
        self._network.load_state_dict(weights)
        self.weights_version, self.weights_update = version, update

    def run(self, batch: PackedBatch) -> Answers:
        """One step of every row in the batch."""
        if self._in_bfloat16 and not self._is_autocast_held:
            # Held by this thread until the weights change, so that they are not copied for each batch.
            self._autocast.__enter__()  # type: ignore[no-untyped-call]
            self._is_autocast_held = True
        started, cpu_started = perf_counter(), thread_time()
        with torch.no_grad():  # in inference mode autocast would copy the weights each time
            action, logits, start = self._run(batch)
        seconds = perf_counter() - started
        self._quickness.took(seconds=seconds, cpu_seconds=thread_time() - cpu_started)
        return Answers(action, logits, start, self.weights_version, self.weights_update, seconds)

    def close(self) -> None:
        """Leaves what `run` entered in its thread; to be called there."""
        if self._is_autocast_held:
            self._autocast.__exit__(None, None, None)
            self._is_autocast_held = False

    def _run(self, batch: PackedBatch) -> tuple[Array, Array, ChunkStart | None]:
        staging, rows = batch.staging, slice(0, batch.rows)
        places = self._places(staging.slots_array[rows])
        self._memory.grow(places.end)

        def sent(tensor: Tensor) -> Tensor:
            return tensor[rows].to(self._device, non_blocking=True)

        begins = np.count_nonzero(staging.is_first_array[rows]) > 0  # otherwise there is nothing to forget
        is_first, reward = sent(staging.is_first), sent(staging.reward)
        previous_action = places.read(self._memory.previous_action)
        if begins:
            previous = previous_inputs(
                previous_action=previous_action,
                previous_reward=reward,
                is_first=is_first.unsqueeze(1),
                reward_clip=self._spec.reward_clip,
            )
        else:
            clipped = clip_rewards(reward, self._spec.reward_clip)
            previous = previous_action.unsqueeze(0), clipped.unsqueeze(0)
        inputs = NetworkInput(
            observation={
                name: self._stacked(name, leaf.to(self._device, non_blocking=True), batch, places).unsqueeze(
                    0
                )
                for name, leaf in staging.observation(batch.rows).items()
            },
            previous_action=previous[0],
            previous_reward=previous[1],
            is_first=is_first.unsqueeze(0),
        )
        state = tuple(_zeroed(places.read(leaf), is_first) for leaf in self._memory.state)
        output, next_state = call_network(self._forward, inputs, state)
        if self._spec.agent == "r2d2":
            logits = output.q_values[0].float()
            action = self._explored(logits, sent(staging.epsilon))
        else:
            logits = output.policy_logits[0].float()
            is_greedy = np.count_nonzero(staging.greedy_array[rows]) > 0
            action = self._chosen(logits, sent(staging.greedy) if is_greedy else None)
        wanted = [action, logits]
        if batch.starts is not None:
            wanted += self._start(batch.starts, inputs, state, reward)
        self._memory.write(places, next_state, action)
        chosen, said, *start = self._on_host(wanted)
        return chosen, said, None if batch.starts is None else ChunkStart(tuple(start[2:]), *start[:2])

    def _stacked(self, name: str, frames: Tensor, batch: PackedBatch, places: Places) -> Tensor:
        """[n, S, …] of the newest frames [n, …]; as they are without stacking."""
        memory = self._memory.frames.get(name)
        if memory is None:
            return frames
        return memory.push(places, frames, is_first=batch.staging.is_first_array[: batch.rows])

    def _chosen(self, logits: Tensor, greedy: Tensor | None) -> Tensor:
        """[n] sampled from softmax(logits), or their argmax where `greedy`.

        argmax(logits − log E) with E from Exp(1) is a sample (Gumbel-max); without noise it is the argmax.
        """
        noise = torch.empty_like(logits).exponential_(generator=self._generator).log_()
        if greedy is not None:
            noise.masked_fill_(greedy.unsqueeze(1), 0)
        return (logits - noise).argmax(dim=1)

    def _explored(self, q_values: Tensor, epsilon: Tensor) -> Tensor:
        """[n] the argmax, or with probability `epsilon` [n] any action, the best one too."""
        count, actions = q_values.shape
        device, generator = q_values.device, self._generator
        explores = torch.rand(count, device=device, generator=generator) < epsilon
        anything = torch.randint(actions, (count,), device=device, generator=generator)
        return torch.where(explores, anything, q_values.argmax(dim=1))

    def _start(self, rows: Array, inputs: NetworkInput, state: State, reward: Tensor) -> list[Tensor]:
        """Previous action, previous reward and state of these rows; copies."""
        places = Places(rows, self._device)
        values = inputs.previous_action[0], _zeroed(reward, inputs.is_first[0]), *state
        return [places.read(value).clone() for value in values]

    def _on_host(self, tensors: Sequence[Tensor]) -> list[Array]:
        """Waits for the device once, whatever their number: its copies go to pinned memory."""
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return [copy.numpy() for copy in copies]


class _Memory:
    """Tensors [slots, …] that grow with the highest slot in use."""

    def __init__(self, spec: RunSpec, network: Network, device: torch.device, *, stack: int) -> None:
        self.slots = 0
        self.state: State = tuple(leaf.to(device)[:0] for leaf in network.initial_state(1))
        self.frames = {
            leaf.name: FrameMemory(leaf.shape, torch_dtype(leaf.dtype), stack=stack, device=device)
            for leaf in (spec.environment.observation if stack > 1 else ())
        }
        self.previous_action = torch.zeros(0, dtype=torch.int64, device=device)

    def grow(self, slots: int) -> None:
        """Makes room for `slots` slots; what is remembered stays."""
        if slots <= self.slots:
            return
        self.slots = max(slots, 2 * self.slots, _LEAST_SLOTS)
        self.state = tuple(self._larger(leaf) for leaf in self.state)
        for frames in self.frames.values():
            frames.grow(self.slots)
        self.previous_action = self._larger(self.previous_action)

    def write(self, places: Places, state: State, action: Tensor) -> None:
        """Remembers what the next step of these slots needs."""
        for mine, new in zip(self.state, state, strict=True):
            places.write(mine, new)
        places.write(self.previous_action, action)

    def _larger(self, tensor: Tensor) -> Tensor:
        larger = tensor.new_zeros((self.slots, *tensor.shape[1:]))
        larger[: len(tensor)] = tensor
        return larger


def _zeroed(values: Tensor, where: Tensor) -> Tensor:
    """`values` [n, …] with the rows `where` [n] zero."""
    return values.masked_fill(where.view(-1, *[1] * (values.dim() - 1)), 0)
