"""The loss against a definition that handles every step of every environment by itself, in float64."""

import math
from typing import Any, Literal

import pytest
import torch

from services.learner.loss import LossInputs, vtrace_loss

SETTINGS: dict[str, Any] = {
    "discount": 0.9,
    "lambda_": 0.8,
    "max_rho": 1.5,
    "max_pg_rho": 1.2,
    "baseline_cost": 0.7,
    "entropy_cost": 0.05,
}
T, B, A = 7, 4, 3


def make_inputs(seed: int = 0, *, resets: bool = True) -> LossInputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    reset_steps = torch.zeros(T, B, dtype=torch.bool)
    terminated = torch.zeros(T, B, dtype=torch.bool)
    if resets:
        terminated[2, 0], reset_steps[3, 0] = True, True  # an episode ends by itself
        reset_steps[4, 1] = True  # one is truncated
        terminated[3, 2] = True  # a life is lost
        reset_steps[0, 3], reset_steps[6, 3] = True, True  # resets at both borders of the chunk
    return LossInputs(
        policy_logits=normal(T, B, A).requires_grad_(),
        baseline=normal(T, B).requires_grad_(),
        bootstrap_value=normal(B),
        behaviour_logits=normal(T, B, A),
        action=torch.randint(0, A, (T, B), generator=g),
        reward=normal(T, B),
        terminated=terminated,
        reset_steps=reset_steps,
    )


def log_softmax(logits: torch.Tensor) -> list[float]:
    values = [float(x) for x in logits]
    norm = math.log(sum(math.exp(x) for x in values))
    return [x - norm for x in values]


def oracle(inputs: LossInputs) -> dict[str, float]:
    """Sums over the valid steps, by the definitions, one environment at a time."""
    policy = value = entropy = 0.0
    inputs = LossInputs(*(tensor.detach() for tensor in inputs))
    s = SETTINGS
    for b in range(B):
        v = [float(x) for x in inputs.baseline[:, b]] + [float(inputs.bootstrap_value[b])]
        vs = [0.0] * T + [v[T]]
        for t in reversed(range(T)):
            gamma = 0.0 if inputs.terminated[t, b] else s["discount"]
            a = int(inputs.action[t, b])
            log_pi = log_softmax(inputs.policy_logits[t, b])
            rho = math.exp(log_pi[a] - log_softmax(inputs.behaviour_logits[t, b])[a])
            if inputs.reset_steps[t, b]:
                vs[t] = v[t]
                continue
            r = float(inputs.reward[t, b])
            delta = min(s["max_rho"], rho) * (r + gamma * v[t + 1] - v[t])
            vs[t] = v[t] + delta + gamma * s["lambda_"] * min(1, rho) * (vs[t + 1] - v[t + 1])
            policy -= log_pi[a] * min(s["max_pg_rho"], rho) * (r + gamma * vs[t + 1] - v[t])
            value += 0.5 * s["baseline_cost"] * (vs[t] - v[t]) ** 2
            entropy -= sum(math.exp(x) * x for x in log_pi)
    return {"policy": policy, "baseline": value, "entropy": entropy}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("resets", [True, False])
def test_the_sums_are_those_of_the_definition(seed: int, resets: bool) -> None:
    inputs = make_inputs(seed, resets=resets)
    terms = vtrace_loss(inputs, **SETTINGS, reduction="sum")
    expected = oracle(inputs)
    valid = T * B - int(inputs.reset_steps.sum())
    assert terms.policy_loss.item() == pytest.approx(expected["policy"], rel=1e-4, abs=1e-4)
    assert terms.baseline_loss.item() == pytest.approx(expected["baseline"], rel=1e-4)
    assert terms.entropy.item() == pytest.approx(expected["entropy"] / valid, rel=1e-5)
    assert terms.entropy_loss.item() == pytest.approx(-0.05 * expected["entropy"], rel=1e-5)
    assert terms.total_loss.item() == pytest.approx(
        sum(term.item() for term in (terms.policy_loss, terms.baseline_loss, terms.entropy_loss)), rel=1e-5
    )


def gradients(inputs: LossInputs, reduction: Literal["sum", "mean"]) -> tuple[torch.Tensor, ...]:
    total = vtrace_loss(inputs, **SETTINGS, reduction=reduction).total_loss
    return torch.autograd.grad(total, (inputs.policy_logits, inputs.baseline))


def test_a_sum_is_the_mean_times_the_number_of_steps_that_are_no_reset_steps() -> None:
    inputs = make_inputs()
    valid = T * B - int(inputs.reset_steps.sum())
    for summed, mean in zip(gradients(inputs, "sum"), gradients(inputs, "mean"), strict=True):
        torch.testing.assert_close(summed, mean * valid)


def test_a_reset_step_has_no_gradient() -> None:
    inputs = make_inputs()
    for gradient in gradients(inputs, "sum"):
        assert (gradient[inputs.reset_steps] == 0).all()
        assert (gradient[~inputs.reset_steps] != 0).all()


def test_nothing_flows_through_the_targets() -> None:
    inputs = make_inputs(resets=False)
    _, gradient = gradients(inputs, "sum")
    expected = oracle(inputs)
    # The gradient of ½ cost (vs − V)² is cost (V − vs) and nothing else.
    assert expected["baseline"] == pytest.approx(float(0.5 / 0.7 * gradient.square().sum()), rel=1e-4)


@pytest.mark.parametrize(
    "changed", ["policy_logits", "behaviour_logits", "reward", "baseline", "action", "terminated"]
)
def test_what_a_reset_step_holds_changes_nothing(changed: str) -> None:
    inputs = make_inputs()
    values = getattr(inputs, changed).detach().clone()
    reset = inputs.reset_steps
    # The observation at a reset step is the episode's real last one: its V is what a truncated episode
    # bootstraps from, so of the baseline only the first row, which nothing precedes, may change.
    if changed == "baseline":
        reset = reset & (torch.arange(T)[:, None] == 0)
    if values.is_floating_point():
        values[reset] += 3.0
    else:
        values[reset] = ~values[reset] if changed == "terminated" else (values[reset] + 1) % A
    other = inputs._replace(**{changed: values.requires_grad_(values.is_floating_point())})
    before, after = (vtrace_loss(each, **SETTINGS, reduction="sum") for each in (inputs, other))
    for name, one, two in zip(before._fields, before, after, strict=True):
        torch.testing.assert_close(one, two, msg=name)


def test_a_truncated_episode_bootstraps_from_the_value_of_its_last_observation() -> None:
    zeros = torch.zeros(3, 1, 2)
    inputs = LossInputs(
        policy_logits=zeros,
        baseline=torch.tensor([[0.0], [10.0], [100.0]]),  # an episode's last is 10, the next one's first 100
        bootstrap_value=torch.tensor([100.0]),
        behaviour_logits=zeros,
        action=torch.zeros(3, 1, dtype=torch.int64),
        reward=torch.zeros(3, 1),
        terminated=torch.zeros(3, 1, dtype=torch.bool),
        reset_steps=torch.tensor([[False], [True], [False]]),
    )
    settings = {**SETTINGS, "lambda_": 1.0, "discount": 1.0}
    terms = vtrace_loss(inputs, **settings, reduction="sum")
    assert terms.target.item() == pytest.approx((10.0 + 100.0) / 2)
    assert terms.value.item() == pytest.approx((0.0 + 100.0) / 2)


def test_a_lost_life_ends_the_return_without_a_reset_step() -> None:
    zeros = torch.zeros(2, 1, 2)
    inputs = LossInputs(
        policy_logits=zeros,
        baseline=torch.tensor([[0.0], [10.0]]),
        bootstrap_value=torch.tensor([10.0]),
        behaviour_logits=zeros,
        action=torch.zeros(2, 1, dtype=torch.int64),
        reward=torch.tensor([[3.0], [0.0]]),
        terminated=torch.tensor([[True], [False]]),
        reset_steps=torch.zeros(2, 1, dtype=torch.bool),
    )
    terms = vtrace_loss(inputs, **{**SETTINGS, "discount": 1.0}, reduction="sum")
    assert terms.target.item() == pytest.approx((3.0 + 10.0) / 2)


def test_a_batch_of_reset_steps_alone_has_no_loss_and_no_gradient() -> None:
    inputs = make_inputs()._replace(reset_steps=torch.ones(T, B, dtype=torch.bool))
    for reduction in ("sum", "mean"):
        terms = vtrace_loss(inputs, **SETTINGS, reduction=reduction)  # type: ignore[arg-type]
        assert [float(term.detach()) for term in terms] == [0.0] * len(terms)
    assert all((gradient == 0).all() for gradient in gradients(inputs, "mean"))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_normalized_advantages_have_mean_0_and_deviation_1_over_the_valid_steps(
    reduction: Literal["sum", "mean"],
) -> None:
    """By its logits, the policy loss has the gradient (π − onehot)·adv."""
    plain, normal = make_inputs(), make_inputs()
    gradients = []
    for inputs, normalize in ((plain, False), (normal, True)):
        settings = SETTINGS | {"entropy_cost": 0.0, "baseline_cost": 0.0}
        terms = vtrace_loss(inputs, **settings, reduction=reduction, normalize_advantages=normalize)
        terms.total_loss.backward()  # type: ignore[no-untyped-call]
        assert inputs.policy_logits.grad is not None
        score = inputs.policy_logits.detach().softmax(-1) - torch.nn.functional.one_hot(inputs.action, A)
        scale = float((~inputs.reset_steps).sum()) if reduction == "mean" else 1.0
        gradients.append(scale * (inputs.policy_logits.grad * score).sum(-1) / score.square().sum(-1))
    valid = ~plain.reset_steps
    advantages, normalized = gradients
    expected = (advantages - advantages[valid].mean()) / advantages[valid].std(correction=0)
    torch.testing.assert_close(normalized[valid], expected[valid], rtol=1e-3, atol=1e-4)
    assert torch.equal(normalized[~valid], torch.zeros(int((~valid).sum())))


def test_a_step_already_pushed_beyond_the_clip_has_no_policy_gradient() -> None:
    """Against the definition: min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A) is flat there, for either sign of A."""
    inputs = make_inputs(3)
    settings = SETTINGS | {"entropy_cost": 0.0, "baseline_cost": 0.0}

    def gradient(policy_clip: float) -> torch.Tensor:
        terms = vtrace_loss(inputs, **settings, reduction="sum", policy_clip=policy_clip)
        return torch.autograd.grad(terms.total_loss, inputs.policy_logits)[0]

    log_prob = inputs.policy_logits.log_softmax(-1).gather(-1, inputs.action.unsqueeze(-1)).squeeze(-1)
    behaviour = inputs.behaviour_logits.log_softmax(-1).gather(-1, inputs.action.unsqueeze(-1)).squeeze(-1)
    rho = (log_prob - behaviour).exp().detach().requires_grad_()
    free, clipped = gradient(0.0), gradient(0.3)
    sign = -(free.gather(-1, inputs.action.unsqueeze(-1)).squeeze(-1)).sign()  # of A: descent raises log π
    surrogate = torch.minimum(rho * sign, rho.clamp(0.7, 1.3) * sign)
    flat = torch.autograd.grad(surrogate.sum(), rho)[0] == 0
    assert 3 < flat.sum() < flat.numel() - 3
    assert (clipped[flat] == 0).all()
    assert torch.equal(clipped[~flat], free[~flat])
