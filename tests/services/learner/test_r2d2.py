"""The R2D2 update: aligned with its history, with the right gradient, target and priorities."""

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.learner.config import LearnerConfig
from services.learner.r2d2 import R2D2Trainer
from services.learner.sequences import SequenceBatch, Shape, staged_sequences
from shared.errors import RunError, TrainingDiverged
from shared.networks.interface import NetworkInput, QOutput, State
from tests.support.learner_history import ACTIONS, REWARD_CLIP, STACK, History, counting_spec, mixed
from tests.support.sequences import sequence

CPU = torch.device("cpu")
EPSILON = 1e-3


class CountingQNetwork(nn.Module):
    """Counts the steps of an episode by `pace`; its Q-values mix everything it is given."""

    def __init__(self, *, scale: float = 1.0, pace: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.pace = nn.Parameter(torch.tensor(pace))

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 1),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[QOutput, State]:
        count, counts = state[0][:, 0], []
        for first in inputs.is_first:
            count = torch.where(first, 0.0, count) + self.pace
            counts.append(count)
        frames = inputs.observation["counter"]
        value = mixed(torch.stack(counts), frames, inputs.previous_action, inputs.previous_reward)
        return QOutput(self.scale * q_of(value)), (count.unsqueeze(-1),)


def q_of(value: Tensor) -> Tensor:
    """[…, A]: another action is best for another value."""
    return torch.cos(value.unsqueeze(-1) + 2.0 * torch.arange(ACTIONS)) * (1 + value.unsqueeze(-1).abs())


def make_config(shape: Shape, **settings: Any) -> LearnerConfig:
    defaults: dict[str, Any] = {
        "agent": "r2d2",
        "precision": "float32",
        "max_gradient_norm": 0.0,
        "learning_rate_schedule": "constant",
        "learning_rate": 1e-3,
        "optimizer": "adam",
        "n_steps": min(3, shape.trained),
        "discount": 0.9,
        "unroll": shape.unroll,
        "burn_in": shape.burn_in,
        "sequence_length": shape.trained,
    }
    return LearnerConfig(**{**defaults, **settings})


def make_trainer(shape: Shape, **settings: Any) -> R2D2Trainer:
    """Online and target network differ, in their Q-values and in how they count."""
    trainer = R2D2Trainer(CountingQNetwork(), make_config(shape, **settings), device=CPU)
    trainer.target_network.load_state_dict(CountingQNetwork(scale=-0.7, pace=2.0).state_dict())
    return trainer


def make_batch(
    shape: Shape, history: History, first: int, weights: np.ndarray | None = None
) -> SequenceBatch:
    """The sequences of all rows that begin with chunk `first`."""
    spec, rows = counting_spec(shape.unroll), len(history.action)
    numbers = range(first, first + shape.chunks)
    sequences = [sequence(history, row, numbers, spec) for row in range(rows)]
    weights = np.ones(rows) if weights is None else weights
    return staged_sequences(sequences, weights, shape, reward_clip=REWARD_CLIP, device=CPU)


# Alignment, by an oracle that knows nothing of chunks


class Oracle:
    """δ of every step of a sequence, by definition, from the uncut history, a step at a time."""

    def __init__(self, history: History, shape: Shape, first: int, *, n: int, discount: float) -> None:
        self.history, self.shape, self.n, self.discount = history, shape, n, discount
        self.start = first * shape.unroll
        self.end = self.start + shape.steps  # of the observation after the last step

    def q(self, row: int, time: int, *, scale: float, pace: float) -> np.ndarray:
        """Q of observation `time`: the stored state counted by ones, the network goes on by `pace`."""
        history = self.history
        begin = history.episode_start(row, time)
        stored = 0.0
        if begin < self.start:
            stored, begin = float(history.counts(self.start - 1)[row]), self.start
        count = stored + pace * (time - begin + 1)
        first = history.is_first[row, time] or time == 0
        action = 0 if first else int(history.action[row, time - 1])
        reward = 0.0 if first else float(history.reward[row, time - 1].clip(-REWARD_CLIP, REWARD_CLIP))
        frames = torch.from_numpy(history.frames(time, STACK)[row])
        value = mixed(torch.tensor(count), frames, torch.tensor(action), torch.tensor(reward))
        result: np.ndarray = (scale * q_of(value)).numpy()
        return result

    def bootstrap(self, row: int, time: int) -> float:
        best = int(self.q(row, time, scale=1.0, pace=1.0).argmax())
        return unrescaled(float(self.q(row, time, scale=-0.7, pace=2.0)[best]))

    def error(self, row: int, time: int) -> float | None:
        """δ of step `time`; None for a reset step."""
        history = self.history
        if history.is_first[row, time + 1]:
            return None
        total, gamma, m = 0.0, 1.0, time
        for _ in range(self.n):
            if m == self.end or history.is_first[row, m + 1]:
                break
            total += gamma * float(history.reward[row, m].clip(-REWARD_CLIP, REWARD_CLIP))
            gamma *= 0.0 if history.terminated[row, m] else self.discount
            m += 1
        target = rescaled(total + gamma * self.bootstrap(row, m))
        return target - float(self.q(row, time, scale=1.0, pace=1.0)[history.action[row, time]])

    def errors(self, row: int) -> list[float]:
        """Of the trained steps, without reset steps."""
        times = range(self.start + self.shape.burn_in, self.end)
        return [error for time in times if (error := self.error(row, time)) is not None]


def rescaled(x: float) -> float:
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + EPSILON * x


def unrescaled(x: float) -> float:
    root = math.sqrt(1 + 4 * EPSILON * (abs(x) + 1 + EPSILON))
    return math.copysign(((root - 1) / (2 * EPSILON)) ** 2 - 1, x)


SHAPES = [Shape(4, 0, 8), Shape(4, 4, 8), Shape(4, 6, 4), Shape(5, 3, 10), Shape(1, 2, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_priorities_are_those_of_the_uncut_history(shape: Shape) -> None:
    """Over chunk borders, burn-in, episodes that end, are truncated, lose lives, and their resets."""
    weights = np.linspace(1.0, 0.1, 8)
    for first in (0, 1, 2):
        history = History.random(rows=8, steps=(first + shape.chunks) * shape.unroll, seed=first)
        trainer = make_trainer(shape, priority_eta=0.8)
        metrics = trainer.train(make_batch(shape, history, first, weights), steps=0)
        oracle = Oracle(history, shape, first, n=3, discount=0.9)
        errors = [oracle.errors(row) for row in range(8)]
        losses = [0.5 * sum(error**2 for error in each) for each in errors]
        assert metrics.total_loss == pytest.approx(float(np.mean(weights * losses)), rel=2e-3)
        for row, each in enumerate(errors):
            sizes = [abs(error) for error in each] or [0.0]
            expected = 0.8 * max(sizes) + 0.2 * sum(sizes) / len(sizes)
            assert trainer.priorities[row] == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_the_histories_hold_every_case() -> None:
    history = History.random(rows=8, steps=60, seed=0)
    resets = history.is_first[:, 1:]
    assert resets.sum() > 20
    assert history.truncated.sum() > 5
    assert (history.terminated[:, :-1] & ~resets[:, 1:]).sum() > 5  # lives lost


def test_the_means_leave_burn_in_and_reset_steps_out() -> None:
    shape = Shape(4, 4, 8)
    history = History.random(rows=8, steps=12, seed=5)
    metrics = make_trainer(shape).train(make_batch(shape, history, 0, np.full(8, 0.5)), steps=0)
    oracle = Oracle(history, shape, 0, n=3, discount=0.9)
    errors = [abs(error) for row in range(8) for error in oracle.errors(row)]
    assert metrics.td_error == pytest.approx(sum(errors) / len(errors), rel=2e-3)
    assert metrics.importance_weight == 0.5
    acted = ~history.is_first[:, 5:13]
    assert metrics.reward == pytest.approx(history.reward[:, 4:][acted].mean(), rel=1e-5)


def test_what_lies_in_burn_in_changes_nothing_but_the_state() -> None:
    shape = Shape(4, 4, 4)
    history = History.random(rows=4, steps=8, seed=2)
    before = make_trainer(shape).train(make_batch(shape, history, 0), steps=0)
    history.reward[:, :3] += 1.0  # step 3's is the previous reward of the first trained one
    history.terminated[:, :4] ^= True
    after = make_trainer(shape).train(make_batch(shape, history, 0), steps=0)
    assert before == after


# Gradient


class TinyNetwork(nn.Module):
    """h' = tanh(U h + W frames), Q = V h', in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.recur = nn.Parameter(torch.randn(3, 3, dtype=torch.float64) / 2)
        self.read = nn.Parameter(torch.randn(3, STACK, dtype=torch.float64) / 200)
        self.head = nn.Parameter(torch.randn(ACTIONS, 3, dtype=torch.float64))

    def initial_state(self, batch_size: int) -> State:
        return (torch.zeros(batch_size, 3, dtype=torch.float64),)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[QOutput, State]:
        hidden, outputs = state[0].double(), []
        for first, frames in zip(inputs.is_first, inputs.observation["counter"], strict=True):
            hidden = hidden.masked_fill(first.unsqueeze(1), 0.0)
            hidden = torch.tanh(hidden @ self.recur.t() + frames.double() @ self.read.t())
            outputs.append(hidden @ self.head.t())
        return QOutput(torch.stack(outputs)), (hidden,)


def test_the_gradient_is_that_of_the_trained_steps_with_targets_and_burn_in_held_fixed() -> None:
    """By finite differences of the loss, whose targets and state after burn-in come from the old weights."""
    torch.manual_seed(0)
    shape = Shape(4, 3, 4)
    history = History.random(rows=3, steps=8, seed=4)
    batch = make_batch(shape, history, 0, np.array([1.0, 0.5, 0.2]))
    batch = batch._replace(state=(torch.randn(3, 3, dtype=torch.float64),))
    network = TinyNetwork()
    trainer = R2D2Trainer(network, make_config(shape, learning_rate=1e-12), device=CPU)
    trainer.target_network.load_state_dict(TinyNetwork().state_dict())
    frozen = deepcopy(network)
    errors, _ = trainer._errors(batch)
    with torch.no_grad():
        _, state = frozen(part(batch.inputs, 0, 3), batch.state)
        chosen = taken(frozen, batch, state)
        targets = errors.detach() + chosen  # 0 where masked, by `resets` below

    def loss() -> float:
        with torch.no_grad():
            difference = (targets - taken(frozen, batch, state)).masked_fill(batch.reset_steps[3:], 0.0)
            return float(0.5 * (batch.importance_weights * difference.square().sum(0)).mean())

    trainer.train(batch, steps=0)
    for name, parameter in frozen.named_parameters():
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        for at in np.ndindex(*parameter.shape):
            with torch.no_grad():
                parameter[at] += 1e-5
                above = loss()
                parameter[at] -= 2e-5
                below = loss()
                parameter[at] += 1e-5
            assert float(gradient[at]) == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-7)


def part(inputs: NetworkInput, start: int, stop: int) -> NetworkInput:
    return NetworkInput(
        {name: leaf[start:stop] for name, leaf in inputs.observation.items()},
        inputs.previous_action[start:stop],
        inputs.previous_reward[start:stop],
        inputs.is_first[start:stop],
    )


def taken(network: nn.Module, batch: SequenceBatch, state: State) -> Tensor:
    """Q of the actions of the trained steps."""
    output, _ = network(part(batch.inputs, 3, 8), state)
    values: Tensor = output.q_values[:-1].gather(-1, batch.action[3:].unsqueeze(-1)).squeeze(-1)
    return values


def test_a_sequence_learns_as_much_as_its_importance_weight_says() -> None:
    shape = Shape(4, 0, 4)
    history = History.random(rows=2, steps=4, seed=1)
    gradients = []
    for weights in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.5]):
        trainer = make_trainer(shape)
        trainer.train(make_batch(shape, history, 0, np.array(weights)), steps=0)
        assert trainer.network.scale.grad is not None
        gradients.append(trainer.network.scale.grad.item())
    assert gradients[2] == pytest.approx(gradients[0] + 0.5 * gradients[1], rel=1e-4)


def test_the_target_network_gets_no_gradient() -> None:
    shape = Shape(4, 2, 4)
    trainer = make_trainer(shape)
    trainer.train(make_batch(shape, History.random(rows=2, steps=8, seed=1), 0), steps=0)
    assert all(parameter.grad is None for parameter in trainer.target_network.parameters())
    assert trainer.target_network.scale.item() == pytest.approx(-0.7)


# Target network


def test_the_target_network_is_copied_after_every_period_of_updates_and_not_between() -> None:
    shape = Shape(4, 0, 4)
    batch = make_batch(shape, History.random(rows=2, steps=4, seed=1), 0)
    trainer = make_trainer(shape, target_update_period=3)
    trainer.updates, trainer.rolled_back = 9, 2  # as restored: seven made these weights
    copied = []
    for _ in range(6):
        trainer.train(batch, steps=0)
        copied.append(trainer.network.scale.item() == trainer.target_network.scale.item())
    assert copied == [False, True, False, False, True, False]


# Restoring and divergence


def test_a_restored_trainer_goes_on_as_if_nothing_had_happened() -> None:
    shape = Shape(4, 2, 4)
    batches = [make_batch(shape, History.random(rows=4, steps=8, seed=seed), 0) for seed in range(8)]
    straight = make_trainer(shape, target_update_period=3)
    for batch in batches[:4]:
        straight.train(batch, steps=0)
    assert straight.network.scale.item() != straight.target_network.scale.item()
    restored = make_trainer(shape, target_update_period=3)
    restored.load(deepcopy(straight.weights()), deepcopy(straight.optimizer_state()))
    restored.updates = straight.updates
    metrics = [[each.train(batch, steps=0) for batch in batches[4:]] for each in (straight, restored)]
    assert metrics[0] == metrics[1]
    np.testing.assert_array_equal(straight.priorities, restored.priorities)


def test_a_checkpoint_without_a_target_network_is_refused() -> None:
    shape = Shape(4, 2, 4)
    trainer = make_trainer(shape)
    state = trainer.optimizer_state()
    del state["target_network"]
    with pytest.raises(KeyError, match="target_network"):
        trainer.load(trainer.weights(), state)
    with pytest.raises(RunError, match="state of optimizer adam, not of rmsprop"):
        make_trainer(shape, optimizer="rmsprop").load(trainer.weights(), trainer.optimizer_state())


def test_a_loss_that_is_not_finite_stops_before_the_parameters_change() -> None:
    shape = Shape(4, 0, 4)
    batch = make_batch(shape, History.random(rows=2, steps=4, seed=1), 0)
    trainer = make_trainer(shape)
    with pytest.raises(TrainingDiverged, match="diverged at update 1: the total loss is"):
        trainer.train(batch._replace(reward=torch.full_like(batch.reward, math.inf)), steps=0)
    assert trainer.network.scale.item() == 1.0
    assert trainer.updates == 0


# Networks of a user's own


class FailsLater(CountingQNetwork):
    """In burn-in, or in what follows it."""

    calls = calls_that_work = 0

    def forward(self, inputs: NetworkInput, state: State) -> tuple[QOutput, State]:
        self.calls += 1
        if self.calls > self.calls_that_work:
            raise ValueError("mask is all False")
        return super().forward(inputs, state)


@pytest.mark.parametrize("calls", [0, 1])
def test_what_a_users_network_raises_names_the_network(calls: int) -> None:
    shape = Shape(4, 4, 4)
    trainer = R2D2Trainer(FailsLater(), make_config(shape), device=CPU)
    trainer.network.calls_that_work = calls  # type: ignore[assignment]
    history = History.random(rows=4, steps=8, seed=2)
    with pytest.raises(RuntimeError, match=f"network {__name__}:FailsLater: ValueError: mask is all False"):
        trainer.train(make_batch(shape, history, 0), steps=0)
