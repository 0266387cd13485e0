"""The training core: aligned with the history it learns from, improving, and stopping before it breaks."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.batches import TrainingBatch, staged
from services.learner.config import LearnerConfig
from services.learner.optimizing import learning_rate
from services.learner.rows import Slice
from services.learner.training import UpdateMetrics, VTraceTrainer
from shared.checkpoints import weights_from_bytes, weights_to_bytes
from shared.errors import RunError, TrainingDiverged
from shared.networks.build import build_network
from shared.networks.interface import NetworkInput, NetworkOutput, State
from shared.specs import LeafSpec, RunSpec
from shared.trees import put_together, taken_apart
from shared.types import Chunk
from tests.support.learner_chunks import make_chunk, make_spec
from tests.support.learner_history import (
    ACTIONS,
    REWARD_CLIP,
    STACK,
    CountingNetwork,
    History,
    counting_spec,
)

CPU = torch.device("cpu")


def make_config(**settings: Any) -> LearnerConfig:
    defaults = {"precision": "float32", "max_gradient_norm": 0.0, "learning_rate_schedule": "constant"}
    return LearnerConfig(**{**defaults, **settings})


def batch_of(*chunks: Chunk, spec: RunSpec) -> TrainingBatch:
    slices = [Slice(chunk, 0, chunk.rows) for chunk in chunks]
    return staged(slices, reward_clip=spec.reward_clip, device=CPU)


def make_trainer(spec: RunSpec | None = None, **settings: Any) -> VTraceTrainer:
    torch.manual_seed(0)
    return VTraceTrainer(build_network(spec or make_spec()), make_config(**settings), device=CPU)


# Alignment


def oracle(history: History, number: int, unroll: int, config: LearnerConfig) -> tuple[float, float, float]:
    """Policy loss, baseline loss and steps of one chunk, from the uncut history, a step at a time."""
    policy = value = 0.0
    steps = 0
    start = number * unroll
    for row in range(len(history.action)):
        v = [float(history.value(start + t, STACK)[row]) for t in range(unroll + 1)]
        vs = list(v)
        for t in reversed(range(unroll)):
            n = start + t
            if history.is_first[row, n + 1]:  # the action was ignored
                continue
            steps += 1
            log_pi = np.array([float(history.counts(n)[row]) % 5 * a / 10 for a in range(ACTIONS)])
            log_pi -= math.log(np.exp(log_pi).sum())
            logits = history.logits[row, n].astype(float)
            action = history.action[row, n]
            rho = math.exp(log_pi[action] - (logits[action] - math.log(np.exp(logits).sum())))
            gamma = 0.0 if history.terminated[row, n] else config.discount
            r = float(np.clip(history.reward[row, n], -REWARD_CLIP, REWARD_CLIP))
            delta = min(1.0, rho) * (r + gamma * v[t + 1] - v[t])
            vs[t] = v[t] + delta + gamma * config.trace_lambda * min(1.0, rho) * (vs[t + 1] - v[t + 1])
            policy -= log_pi[action] * min(1.0, rho) * (r + gamma * vs[t + 1] - v[t])
            value += 0.5 * config.baseline_cost * (vs[t] - v[t]) ** 2
    return policy, value, steps


@pytest.mark.parametrize("unroll", [1, 2, 5, 13])
def test_the_loss_of_every_chunk_is_that_of_the_uncut_history(unroll: int) -> None:
    """Over chunk borders, episodes that end, are truncated, lose lives, and the resets between them."""
    history = History.random(rows=8, steps=52, seed=unroll)
    resets = history.is_first[:, 1:]
    assert resets.sum() > 20
    assert history.truncated.sum() > 5
    assert (history.terminated[:, :-1] & ~resets[:, 1:]).sum() > 5  # lives lost
    spec = counting_spec(unroll)
    config = make_config(trace_lambda=0.9)
    for number in range(52 // unroll):
        trainer = VTraceTrainer(CountingNetwork(), config, device=CPU)
        metrics = trainer.train(batch_of(history.chunk(number, spec), spec=spec), steps=0)
        policy, value, steps = oracle(history, number, unroll, config)
        assert metrics.policy_loss == pytest.approx(policy, rel=1e-3, abs=1e-3)
        assert metrics.baseline_loss == pytest.approx(value, rel=1e-4, abs=1e-4)
        assert metrics.entropy_loss == pytest.approx(-config.entropy_cost * steps * metrics.entropy, rel=1e-4)


# Learning


def bandit_chunk(trainer: VTraceTrainer, spec: RunSpec, random: np.random.Generator, best: int) -> Chunk:
    """A chunk of on-policy steps in a bandit that pays 1 for the `best` action."""
    chunk = make_chunk(spec=spec, rows=16)
    state = trainer.network.initial_state(16)  # type: ignore[operator]
    batch = batch_of(chunk, spec=spec)
    with torch.no_grad():
        logits = trainer.network(batch.inputs, state)[0].policy_logits[:-1]
    probabilities = logits.softmax(-1).transpose(0, 1).numpy()
    actions = (probabilities.cumsum(-1) > random.random((16, spec.unroll, 1))).argmax(-1)
    return replace(
        chunk,
        action=actions,
        behaviour_logits=logits.transpose(0, 1).contiguous().numpy(),
        reward=(actions == best).astype(np.float32),
        terminated=np.ones_like(actions, bool),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "learning_rate": 0.02, "loss_reduction": "mean"},
        {"optimizer": "rmsprop", "learning_rate": 0.003, "loss_reduction": "sum"},
    ],
)
def test_a_bandit_is_learned(settings: dict[str, Any]) -> None:
    spec, random = make_spec(unroll=5, actions=4), np.random.default_rng(0)
    trainer = make_trainer(spec, entropy_cost=0.001, **settings)
    rewards = []
    for _ in range(150):
        chunk = bandit_chunk(trainer, spec, random, best=2)
        rewards.append(chunk.reward.mean())
        trainer.train(batch_of(chunk, spec=spec), steps=0)
    assert np.mean(rewards[:5]) < 0.5
    assert np.mean(rewards[-10:]) > 0.95


def test_the_value_of_a_two_state_chain_is_learned() -> None:
    """State A pays 0 and leads to B, B pays 1 and ends: V(B) = 1, V(A) = γ, nothing comes from the resets."""
    spec = make_spec(unroll=6, actions=2)
    trainer = make_trainer(spec, optimizer="adam", learning_rate=0.01, loss_reduction="mean", discount=0.5)
    chunk = make_chunk(spec=spec, rows=4)
    a, b, last = np.eye(3, dtype=np.float32)
    steps = [a, b, last, a, b, last, a]  # the last observation of an episode, then the first of the next
    chunk.observation["observation"][:] = np.stack(steps)
    chunk.is_first[:, [3, 6]] = True
    chunk.reward[:, [1, 4]] = 1.0
    chunk.terminated[:, [1, 4]] = True
    chunk.behaviour_logits[:] = 0.0
    chunk.reward[:, [2, 5]] = 1e6  # reset steps: whatever stands there must not matter
    batch = batch_of(chunk, spec=spec)
    for _ in range(600):
        trainer.train(batch, steps=0)
    with torch.no_grad():
        values = trainer.network(batch.inputs, batch.state)[0].baseline[:, 0]
    assert values[1].item() == pytest.approx(1.0, abs=0.05)
    assert values[0].item() == pytest.approx(0.5, abs=0.05)


def test_the_reward_scale_multiplies_what_was_clipped() -> None:
    spec = counting_spec(5)
    chunk = History.random(rows=8, steps=10, seed=0).chunk(1, spec)
    scaled = replace(chunk, reward=0.5 * chunk.reward.clip(-REWARD_CLIP, REWARD_CLIP))
    metrics = [
        VTraceTrainer(CountingNetwork(), make_config(reward_scale=scale), device=CPU).train(batch, steps=0)
        for scale, batch in (
            (0.5, batch_of(chunk, spec=spec)),
            (1.0, batch_of(scaled, spec=spec)._replace(inputs=batch_of(chunk, spec=spec).inputs)),
        )
    ]
    raw = batch_of(chunk, spec=spec).mean_reward.item()
    assert metrics[0] == metrics[1]._replace(reward=raw)


# Several gradient steps per update


def test_a_batch_used_twice_is_two_gradient_steps_of_one_update() -> None:
    spec = make_spec()
    batch = batch_of(make_chunk(spec=spec), spec=spec)
    once, twice = make_trainer(spec), make_trainer(spec, sample_reuse=2)
    for _ in range(2):
        once.train(batch, steps=0)
    twice.train(batch, steps=0)
    assert (once.updates, twice.updates) == (2, 1)
    for one, two in zip(once.network.parameters(), twice.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_minibatches_are_equal_parts_that_hold_every_row_once_in_every_pass() -> None:
    spec = counting_spec(5)
    batch = batch_of(History.random(rows=12, steps=10, seed=0).chunk(1, spec), spec=spec)

    def trained(**settings: Any) -> tuple[UpdateMetrics, list[int]]:
        """Metrics of an update that changes next to nothing, and the rows in each of its gradient steps."""
        rows = []

        class Watched(CountingNetwork):
            def forward(self, inputs: Any, state: Any) -> Any:
                rows.append(inputs.is_first.shape[1])
                return super().forward(inputs, state)

        config = make_config(learning_rate=1e-12, batch_size=12, **settings)
        torch.manual_seed(1)
        return VTraceTrainer(Watched(), config, device=CPU).train(batch, steps=0), rows

    whole, one = trained()
    parts, six = trained(minibatches=3, sample_reuse=2)
    assert (one, six) == ([12], 6 * [4])
    for name in ("policy_loss", "baseline_loss", "entropy_loss"):  # sums over a third of the rows, averaged
        assert 3 * getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    assert parts.reward == pytest.approx(whole.reward) == batch.mean_reward.item()


# Optimizers


def one_step(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of one update from fresh weights, and by how much the weights changed."""
    spec = make_spec()
    trainer = make_trainer(spec, **settings)
    parameter = next(trainer.network.parameters())
    before = parameter.detach().clone()
    chunk = make_chunk(spec=spec)
    chunk.reward[:] = 1.0
    trainer.train(batch_of(chunk, spec=spec), steps=0)
    assert parameter.grad is not None
    return parameter.grad, parameter.detach() - before


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_an_update_in_several_threads_is_the_update_in_one(threads: int) -> None:
    """Nine threads for seven rows: some have nothing to do."""
    state = tuple(np.random.default_rng(1).normal(size=(7, 6)).astype(np.float32) for _ in range(2))
    spec = make_spec(lstm_size=6)
    batch = batch_of(make_chunk(spec=spec, rows=7, state=state), spec=spec)
    alone = make_trainer(spec, optimizer="adam")
    together = make_trainer(spec, optimizer="adam", training_threads=threads)
    for _ in range(3):
        one, many = alone.train(batch, steps=0), together.train(batch, steps=0)
        assert many == pytest.approx(one, rel=1e-4)
    for name, weights in alone.weights().items():
        torch.testing.assert_close(together.weights()[name], weights, rtol=1e-4, atol=1e-5)


FRAME = LeafSpec(name="observation", dtype="uint8", shape=(36, 36), low=(0.0,), high=(255.0,))


def frames_spec(network: str) -> RunSpec:
    return make_spec(network=network, frame_stack=2, observation=(FRAME,), reward_clip=1.0)


def contiguous_trainer(spec: RunSpec, **settings: Any) -> VTraceTrainer:
    """One whose weights all lie in the order of their dimensions, which every optimizer understands."""
    trainer = make_trainer(spec, **settings)
    for parameter in trainer.network.parameters():
        parameter.data = parameter.data.contiguous()
    return trainer


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("network", ["impala_shallow", "impala_deep", "nature"])
def test_how_weights_lie_in_memory_changes_nothing(network: str, optimizer: str) -> None:
    """Neither with gradients that threads sum up nor with moments that a checkpoint brings."""
    spec = frames_spec(network)
    batches = [batch_of(make_chunk(spec=spec, rows=4, seed=seed), spec=spec) for seed in range(4)]
    settings = {"optimizer": optimizer, "learning_rate": 1e-3, "adam_epsilon": 1e-3}  # noise stays small
    expected, threaded = (
        contiguous_trainer(spec, **settings),
        make_trainer(spec, **settings, training_threads=2),
    )
    stopped, resumed = make_trainer(spec, **settings), make_trainer(spec, **settings)
    for batch in batches:
        expected.train(batch, steps=0)
        threaded.train(batch, steps=0)
    for batch in batches[:2]:
        stopped.train(batch, steps=0)
    resumed.load(*saved_and_read(stopped))
    for parameter, kept in resumed.optimizer.state.items():
        assert all(each.stride() == parameter.stride() for each in kept.values() if each.dim())
    for batch in batches[2:]:
        resumed.train(batch, steps=0)
    for trainer in (threaded, resumed):
        for name, weights in expected.weights().items():
            torch.testing.assert_close(trainer.weights()[name], weights, rtol=0, atol=2e-4, msg=name)


def saved_and_read(trainer: VTraceTrainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and optimizer state, as a checkpoint's file brings them back."""
    tensors, structure = taken_apart(trainer.optimizer_state())
    read = weights_from_bytes(weights_to_bytes(tensors))
    return weights_from_bytes(weights_to_bytes(trainer.weights())), put_together(read, structure)


def test_rmsprop_has_its_epsilon_outside_the_root() -> None:
    gradient, change = one_step(learning_rate=0.1, rmsprop_decay=0.9, rmsprop_epsilon=0.5)
    expected = -0.1 * gradient / ((0.1 * gradient.square()).sqrt() + 0.5)
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)


def test_adam_with_its_first_decay_zero_divides_by_the_gradients_size() -> None:
    gradient, change = one_step(optimizer="adam", learning_rate=0.1, adam_beta1=0.0, adam_epsilon=1e-12)
    seen = gradient != 0
    torch.testing.assert_close(change[seen], -0.1 * gradient[seen].sign(), rtol=1e-3, atol=1e-6)


def test_a_large_gradient_is_scaled_down_to_the_norm_and_reported_as_it_was() -> None:
    spec = make_spec()
    chunk = make_chunk(spec=spec)
    chunk.reward[:] = 100.0
    norms = []
    for limit in (0.0, 3.0):
        trainer = make_trainer(spec, max_gradient_norm=limit)
        metrics = trainer.train(batch_of(chunk, spec=spec), steps=0)
        left = torch.nn.utils.get_total_norm([p.grad for p in trainer.network.parameters()])  # type: ignore[misc]
        norms.append((metrics.gradient_norm, left.item()))
    (unclipped, as_it_was), (reported, clipped) = norms
    assert unclipped == pytest.approx(as_it_was, rel=1e-4)
    assert unclipped > 10
    assert reported == pytest.approx(unclipped, rel=1e-5)
    assert clipped == pytest.approx(3.0, rel=1e-4)


def test_the_learning_rate_falls_linearly_to_zero_over_the_steps() -> None:
    config = make_config(learning_rate=0.2, total_steps=1000, learning_rate_schedule="linear")
    rates = [learning_rate(config, steps) for steps in (0, 250, 1000, 1200)]
    assert rates == pytest.approx([0.2, 0.15, 0.0, 0.0])
    constant = make_config(learning_rate=0.2, total_steps=1000)
    assert learning_rate(constant, 900) == 0.2


def test_an_update_uses_the_rate_of_its_steps() -> None:
    trainer = make_trainer(learning_rate_schedule="linear", total_steps=100, learning_rate=0.5)
    spec = make_spec()
    metrics = trainer.train(batch_of(make_chunk(spec=spec), spec=spec), steps=100)
    assert metrics.learning_rate == 0.0
    weights = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    trainer.train(batch_of(make_chunk(spec=spec), spec=spec), steps=100)
    for before, after in zip(weights, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(before, after.detach())


# Divergence


@pytest.mark.parametrize(
    ("field", "value", "term"),
    [
        ("reward", 1e38, "baseline loss is inf"),
        ("reward", math.inf, "policy loss is"),
        ("behaviour_logits", math.nan, "policy loss is nan"),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(
    field: str, value: float, term: str
) -> None:
    spec = make_spec()
    trainer = make_trainer(spec)
    trainer.train(batch_of(make_chunk(spec=spec), spec=spec), steps=0)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    state = {key: str(value) for key, value in trainer.optimizer.state_dict().items()}
    chunk = make_chunk(spec=spec)
    getattr(chunk, field)[0, 0] = value
    with pytest.raises(TrainingDiverged, match=f"diverged at update 2: the {term}"):
        trainer.train(batch_of(chunk, spec=spec), steps=0)
    for old, new in zip(before, trainer.network.parameters(), strict=True):
        assert torch.equal(old, new.detach())
    assert state == {key: str(value) for key, value in trainer.optimizer.state_dict().items()}
    assert trainer.updates == 1


def test_a_gradient_that_is_not_finite_is_named() -> None:
    class RootNetwork(CountingNetwork):
        """√(w − 1) is 0 where its gradient is infinite."""

        def forward(self, inputs: Any, state: Any) -> Any:
            output, state = super().forward(inputs, state)
            return output._replace(baseline=output.baseline + (self.weight - 1).sqrt()), state

    spec = counting_spec(4)
    trainer = VTraceTrainer(RootNetwork(), make_config(), device=CPU)
    history = History.random(rows=2, steps=8, seed=0)
    with pytest.raises(TrainingDiverged, match="the gradient norm is"):
        trainer.train(batch_of(history.chunk(0, spec), spec=spec), steps=0)
    assert trainer.network.weight.item() == 1.0


def test_weights_that_are_not_finite_are_never_handed_out() -> None:
    trainer = make_trainer(learning_rate=1e38)
    spec = make_spec()
    chunk = make_chunk(spec=spec)
    chunk.reward[:] = 1.0
    assert trainer.weights()
    trainer.train(batch_of(chunk, spec=spec), steps=0)
    with torch.no_grad():
        next(trainer.network.parameters()).view(-1)[0] = math.inf
    with pytest.raises(TrainingDiverged, match="after update 1 a weight is not finite"):
        trainer.weights()


def test_buffers_may_hold_infinities_or_nothing() -> None:
    class MaskingNetwork(CountingNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
            self.register_buffer("nothing", torch.zeros(0))

    trainer = VTraceTrainer(MaskingNetwork(), make_config(), device=CPU)
    assert {"weight", "mask", "nothing"} <= trainer.weights().keys()


# Restoring


def test_a_restored_trainer_goes_on_as_if_nothing_had_happened() -> None:
    spec = make_spec()
    batches = [batch_of(make_chunk(spec=spec, seed=seed), spec=spec) for seed in range(6)]
    for settings in ({"optimizer": "adam"}, {"optimizer": "rmsprop", "rmsprop_momentum": 0.5}):
        straight = make_trainer(spec, **settings)
        for batch in batches[:3]:
            straight.train(batch, steps=0)
        restored = make_trainer(spec, **settings, seed=1)
        restored.load(
            deepcopy(straight.weights()),
            deepcopy(straight.optimizer_state()),
        )
        metrics = [[t.train(batch, steps=0) for batch in batches[3:]] for t in (straight, restored)]
        assert metrics[0] == metrics[1]


def test_what_is_configured_now_wins_over_what_the_checkpoint_was_trained_with() -> None:
    before = make_trainer(rmsprop_decay=0.5, rmsprop_epsilon=0.5)
    after = make_trainer(rmsprop_decay=0.9, rmsprop_epsilon=0.1)
    after.load(before.weights(), before.optimizer_state())
    assert after.optimizer.param_groups[0]["alpha"] == 0.9
    assert after.optimizer.param_groups[0]["eps"] == 0.1


def test_momentum_can_be_switched_on_for_a_run_that_was_without() -> None:
    spec = make_spec()
    batch = batch_of(make_chunk(spec=spec), spec=spec)
    before, after = make_trainer(spec), make_trainer(spec, rmsprop_momentum=0.9)
    before.train(batch, steps=0)
    after.load(before.weights(), before.optimizer_state())
    after.train(batch, steps=0)
    assert all("momentum_buffer" in state for state in after.optimizer.state.values())


def test_a_run_with_momentum_goes_on_from_before_its_first_update() -> None:
    spec = make_spec()
    batch = batch_of(make_chunk(spec=spec), spec=spec)
    before, after = (make_trainer(spec, rmsprop_momentum=0.9) for _ in range(2))
    after.load(before.weights(), before.optimizer_state())
    assert after.train(batch, steps=0) == before.train(batch, steps=0)


def test_another_optimizers_state_is_refused_in_words() -> None:
    before, after = make_trainer(optimizer="adam"), make_trainer(optimizer="rmsprop")
    with pytest.raises(RunError, match="state of optimizer adam, not of rmsprop"):
        after.load(before.weights(), before.optimizer_state())


# Networks of a user's own


class Fails(CountingNetwork):
    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        raise ValueError("mask is all False")


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_users_network_raises_names_the_network(threads: int) -> None:
    spec = counting_spec(unroll=4)
    trainer = VTraceTrainer(Fails(), make_config(training_threads=threads), device=CPU)
    with pytest.raises(RuntimeError, match=f"network {__name__}:Fails: ValueError: mask is all False"):
        trainer.train(batch_of(make_chunk(spec=spec), spec=spec), steps=4)
