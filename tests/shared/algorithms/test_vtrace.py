import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.algorithms.vtrace import vtrace_targets

GOLDEN = json.loads((Path(__file__).parents[2] / "data/vtrace.json").read_text())


def make_inputs(steps: int = 6, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "log_rhos": normal(steps, batch),
        "discounts": torch.full((steps, batch), 0.9, dtype=torch.float64),
        "rewards": normal(steps, batch),
        "values": normal(steps, batch),
        "bootstrap_value": normal(batch),
    }


def oracle(
    *,
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    lambda_: float = 1.0,
    max_rho: float = 1.0,
    max_pg_rho: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """By definition: vs_s = V_s + Σ_{t ≥ s} (Π_{s ≤ i < t} γ_i c_i) δ_t, a double loop over plain floats."""
    steps, batch = log_rhos.shape
    targets = torch.empty(steps, batch, dtype=torch.float64)
    advantages = torch.empty(steps, batch, dtype=torch.float64)
    for b in range(batch):
        rho = [math.exp(x) for x in log_rhos[:, b].tolist()]
        gamma, reward = discounts[:, b].tolist(), rewards[:, b].tolist()
        value = [*values[:, b].tolist(), bootstrap_value[b].item()]
        for s in range(steps):
            total, product = value[s], 1.0
            for t in range(s, steps):
                total += product * min(max_rho, rho[t]) * (reward[t] + gamma[t] * value[t + 1] - value[t])
                product *= gamma[t] * lambda_ * min(1.0, rho[t])
            targets[s, b] = total
        for s in range(steps):
            following = targets[s + 1, b].item() if s + 1 < steps else value[steps]
            advantages[s, b] = min(max_pg_rho, rho[s]) * (reward[s] + gamma[s] * following - value[s])
    return targets, advantages


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_golden_vectors_are_reproduced(index: int) -> None:
    golden = GOLDEN[index]
    log_rhos, discounts, rewards, values = (
        torch.tensor(golden[name], dtype=torch.float64)
        for name in ("log_rhos", "discounts", "rewards", "values")
    )
    result = vtrace_targets(
        log_rhos=log_rhos,
        discounts=discounts,
        rewards=rewards,
        values=values[:-1],
        bootstrap_value=values[-1],
        lambda_=golden["lambda_"],
        max_rho=golden["clip_rho"],
        max_pg_rho=golden["clip_pg_rho"],
    )
    expected = torch.tensor(golden["expected_vs"], dtype=torch.float64)
    torch.testing.assert_close(result.values, expected, rtol=0, atol=1e-9)
    if "expected_pg_advantages" in golden:
        expected = torch.tensor(golden["expected_pg_advantages"], dtype=torch.float64)
        torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_vector_with_wide_ratios_is_reproduced(dtype: torch.dtype) -> None:
    k = torch.arange(25, dtype=dtype).reshape(5, 5)
    row = torch.arange(1, 6, dtype=dtype)
    result = vtrace_targets(
        log_rhos=5 * (k / 25 - 0.5),
        discounts=(0.9 / row).expand(5, 5),
        rewards=k,
        values=k / 5,
        bootstrap_value=row,
        max_rho=3.7,
        max_pg_rho=2.2,
    )

    def assert_rows(actual: Tensor, rows: dict[int, list[float]], atol: float) -> None:
        for t, expected in rows.items():
            torch.testing.assert_close(actual[t], torch.tensor(expected, dtype=dtype), rtol=0, atol=atol)

    assert_rows(result.values, {0: [0.929816, 0.556437, 0.816895, 1.189767, 1.654995]}, 2e-6)
    assert_rows(result.values, {4: [66.53, 69.69, 72.85, 76.01, 79.17]}, 6e-3)
    assert_rows(result.advantages, {0: [0.929816, 0.356437, 0.416895, 0.589767, 0.854995]}, 2e-6)
    assert_rows(result.advantages, {4: [37.18, 38.94, 40.70, 42.46, 44.22]}, 6e-3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_targets_equal_the_definition(data: st.DataObject) -> None:
    steps, batch = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    inputs = make_inputs(steps, batch, seed=data.draw(st.integers(0, 10_000)))
    for _ in range(data.draw(st.integers(0, 4))):
        t, b = data.draw(st.integers(0, steps - 1)), data.draw(st.integers(0, batch - 1))
        if data.draw(st.booleans()):
            inputs["log_rhos"][t, b] = -math.inf
        else:
            inputs["discounts"][t, b] = 0.0
    clips = {
        "lambda_": data.draw(st.floats(0, 1)),
        "max_rho": data.draw(st.floats(0.1, 4)),
        "max_pg_rho": data.draw(st.floats(0.1, 4)),
    }
    result = vtrace_targets(**inputs, **clips)
    targets, advantages = oracle(**inputs, **clips)
    torch.testing.assert_close(result.values, targets, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.advantages, advantages, rtol=1e-10, atol=1e-10)


def test_on_policy_targets_are_discounted_returns() -> None:
    inputs = make_inputs(4, 1)
    inputs["log_rhos"].zero_()
    total = inputs["bootstrap_value"]
    for t in reversed(range(4)):
        total = inputs["rewards"][t] + 0.9 * total
    torch.testing.assert_close(vtrace_targets(**inputs).values[0], total)


def test_an_episode_end_hides_everything_after_it() -> None:
    inputs = make_inputs()
    inputs["discounts"][2] = 0.0
    before = vtrace_targets(**inputs)
    inputs["rewards"][3:] += 100.0
    after = vtrace_targets(**inputs)
    torch.testing.assert_close(before.values[:3], after.values[:3])
    torch.testing.assert_close(before.advantages[:3], after.advantages[:3])
    assert not torch.allclose(before.values[3:], after.values[3:])


def reset_example() -> dict[str, Any]:
    """Truncated after step 0 with V(real last observation) = 10; step 1 is the reset; then V is 100."""
    return {
        "log_rhos": torch.tensor([[0.0], [-math.inf], [0.0]]),
        "discounts": torch.full((3, 1), 0.9),
        "rewards": torch.tensor([[1.0], [0.0], [1.0]]),
        "values": torch.tensor([[5.0], [10.0], [100.0]]),
        "bootstrap_value": torch.tensor([100.0]),
    }


def test_a_truncated_episode_bootstraps_from_its_real_last_value_and_not_over_the_reset() -> None:
    result = vtrace_targets(**reset_example())
    assert result.values[0].item() == pytest.approx(1 + 0.9 * 10)
    assert result.values[1].item() == 10
    assert result.advantages[1].item() == 0


def test_masking_the_loss_alone_or_discounting_with_zero_would_be_wrong_at_a_reset() -> None:
    inputs = reset_example()
    unmarked = {**inputs, "log_rhos": torch.zeros(3, 1)}
    assert vtrace_targets(**unmarked).values[0].item() == pytest.approx(74.71)
    zero_discount = {**unmarked, "discounts": torch.tensor([[0.9], [0.0], [0.9]])}
    assert vtrace_targets(**zero_discount).values[0].item() == pytest.approx(1.0)


def test_what_follows_a_reset_step_does_not_reach_what_precedes_it() -> None:
    inputs = make_inputs()
    inputs["log_rhos"][3, 1] = -math.inf
    before = vtrace_targets(**inputs)
    inputs["values"][4:] += 50.0
    inputs["rewards"][3:] -= 7.0
    after = vtrace_targets(**inputs)
    torch.testing.assert_close(before.values[:3, 1], after.values[:3, 1])
    assert after.values[3, 1] == inputs["values"][3, 1]
    assert not torch.allclose(before.values[:3, 0], after.values[:3, 0])


def test_no_gradient_passes_through_the_results() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs().items() if name != "discounts"}
    result = vtrace_targets(**inputs, discounts=torch.full((6, 3), 0.9))
    assert not result.values.requires_grad
    assert not result.advantages.requires_grad


def test_inputs_are_left_as_they_were() -> None:
    inputs = make_inputs()
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    vtrace_targets(**inputs)
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor, copies[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["discounts", "rewards", "values", "bootstrap_value"])
def test_a_wrong_shape_is_named(name: str) -> None:
    inputs = make_inputs()
    inputs[name] = inputs[name].unsqueeze(-1)
    with pytest.raises(ValueError, match=name):
        vtrace_targets(**inputs)


def test_inputs_that_agree_on_having_no_steps_are_refused_by_name() -> None:
    inputs = {
        name: tensor if name == "bootstrap_value" else tensor[:0] for name, tensor in make_inputs().items()
    }
    with pytest.raises(ValueError, match=r"log_rhos must be \[T, B\] with at least one step"):
        vtrace_targets(**inputs)


def test_values_that_include_the_bootstrap_value_are_refused() -> None:
    inputs = make_inputs()
    inputs["values"] = torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"values must be \[6, 3\].*not \[7, 3\]"):
        vtrace_targets(**inputs)


@pytest.mark.parametrize("shape", [(6,), (0, 3), (6, 3, 1)])
def test_log_rhos_without_steps_and_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_rhos"):
        vtrace_targets(**{**make_inputs(), "log_rhos": torch.zeros(shape)})
