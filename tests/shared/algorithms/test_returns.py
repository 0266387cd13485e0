import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.algorithms.returns import double_q_targets, double_q_td_errors, rescale, unrescale

GOLDEN = json.loads((Path(__file__).parents[2] / "data/r2d2.json").read_text())


def h(x: float, epsilon: float) -> float:
    """By definition, in float64."""
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x


def h_inverse(x: float, epsilon: float) -> float:
    root = math.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon))
    return math.copysign(((root - 1) / (2 * epsilon)) ** 2 - 1, x)


def make_inputs(steps: int = 8, batch: int = 3, actions: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "online_q": normal(steps + 1, batch, actions),
        "target_q": 3 * normal(steps + 1, batch, actions),
        "actions": torch.randint(actions, (steps, batch), generator=generator),
        "rewards": normal(steps, batch),
        "discounts": torch.full((steps, batch), 0.9, dtype=torch.float64),
        "n": 3,
        "reset_steps": torch.zeros(steps, batch, dtype=torch.bool),
    }


def oracle(
    *,
    online_q: Tensor,
    target_q: Tensor,
    actions: Tensor,
    rewards: Tensor,
    discounts: Tensor,
    n: int,
    reset_steps: Tensor,
    epsilon: float = 1e-3,
) -> Tensor:
    """By definition, a walk over plain floats from every step on."""
    steps, batch = rewards.shape
    errors = torch.zeros(steps, batch, dtype=torch.float64)
    for b in range(batch):
        online, target = online_q[:, b].tolist(), target_q[:, b].tolist()
        reward, gamma, reset = (each[:, b].tolist() for each in (rewards, discounts, reset_steps))

        def value(time: int, online: Any = online, target: Any = target) -> float:
            return h_inverse(target[time][online[time].index(max(online[time]))], epsilon)

        for t in range(steps):
            if reset[t]:
                continue
            total, product, time = 0.0, 1.0, t
            while time < min(t + n, steps) and not reset[time]:
                total += product * reward[time]
                product *= gamma[time]
                time += 1
            total += product * value(time)
            errors[t, b] = h(total, epsilon) - online[t][actions[t, b]]
    return errors


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_golden_vectors_are_reproduced_in_plain_space(index: int) -> None:
    """The file's errors are of n-step double Q-learning without rescaling, although it names an ε.

    So its Q-values are given rescaled, which leaves the greedy actions as they are, and the targets compared
    after their inverse. Of rescaling itself these vectors say nothing; the definition below does.
    """
    golden = GOLDEN[index]
    online_q, target_q, rewards, discounts, expected = (
        torch.tensor(golden[name], dtype=torch.float64)
        for name in ("online_q", "target_q", "rewards", "discounts", "expected_td_errors")
    )
    targets = double_q_targets(
        online_q=rescale(online_q, golden["epsilon"]),
        target_q=rescale(target_q, golden["epsilon"]),
        rewards=rewards,
        discounts=discounts,
        n=golden["n_step"],
        epsilon=golden["epsilon"],
    )
    actions = torch.tensor(golden["actions"]).unsqueeze(-1)
    errors = unrescale(targets, golden["epsilon"]) - online_q[:-1].gather(-1, actions).squeeze(-1)
    torch.testing.assert_close(errors, expected, rtol=0, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_td_errors_equal_the_definition(data: st.DataObject) -> None:
    steps, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    inputs = make_inputs(steps, batch, data.draw(st.integers(1, 4)), seed=data.draw(st.integers(0, 10_000)))
    for _ in range(data.draw(st.integers(0, 5))):
        t, b = data.draw(st.integers(0, steps - 1)), data.draw(st.integers(0, batch - 1))
        if data.draw(st.booleans()):
            inputs["reset_steps"][t, b] = True
        else:
            inputs["discounts"][t, b] = 0.0
    inputs["n"] = data.draw(st.integers(1, 11))
    epsilon = data.draw(st.sampled_from([1e-3, 1e-2, 0.5]))
    result = double_q_td_errors(**inputs, epsilon=epsilon)
    torch.testing.assert_close(result, oracle(**inputs, epsilon=epsilon), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_end_with_the_episode_and_with_the_unroll(dtype: torch.dtype) -> None:
    bootstraps = torch.tensor([0.0, 100, 200, 300, 400, 500, 600, 700], dtype=dtype)
    discounts = torch.full((7, 1), 0.9, dtype=dtype)
    discounts[3] = 0.0
    q_values = rescale(bootstraps).reshape(8, 1, 1)
    targets = double_q_targets(
        online_q=q_values,
        target_q=q_values,
        rewards=torch.arange(1, 8, dtype=dtype).unsqueeze(1),
        discounts=discounts,
        n=3,
    )
    expected = [
        1 + 1.8 + 0.81 * 3 + 0.729 * 300,
        2 + 2.7 + 3.24,
        6.6,
        4,
        5 + 5.4 + 5.67 + 0.729 * 700,
        6 + 6.3 + 0.81 * 700,
        7 + 630,
    ]
    torch.testing.assert_close(unrescale(targets).squeeze(1), torch.tensor(expected, dtype=dtype))


def test_a_truncated_episode_bootstraps_from_its_real_last_value_and_not_over_the_reset() -> None:
    inputs = make_inputs(steps=5, batch=1, actions=1)
    inputs["reset_steps"][2] = True  # x_2 is the real last observation, x_3 the next episode's first
    values = unrescale(inputs["target_q"])[:, 0, 0]
    targets = double_q_targets(**{name: each for name, each in inputs.items() if name != "actions"})
    rewards = inputs["rewards"][:, 0]
    expected = torch.stack([rewards[0] + 0.9 * rewards[1] + 0.81 * values[2], rewards[1] + 0.9 * values[2]])
    torch.testing.assert_close(unrescale(targets)[:2, 0], expected)
    assert double_q_td_errors(**inputs)[2] == 0


def test_neither_forgetting_the_reset_nor_a_discount_of_zero_would_do() -> None:
    inputs = make_inputs(steps=5, batch=1)
    inputs["reset_steps"][2] = True
    right = double_q_td_errors(**inputs)
    inputs["reset_steps"][2] = False
    assert not torch.isclose(right[:2], double_q_td_errors(**inputs)[:2]).any()
    inputs["discounts"][2] = 0.0
    assert not torch.isclose(right[:2], double_q_td_errors(**inputs)[:2]).any()


def test_what_follows_a_reset_step_or_an_end_does_not_reach_what_precedes_it() -> None:
    inputs = make_inputs(seed=1)
    inputs["reset_steps"][4, 1] = True
    inputs["discounts"][3, 2] = 0.0
    before = double_q_td_errors(**inputs)
    inputs["rewards"][4:] += 50.0
    inputs["target_q"][5:] -= 7.0
    after = double_q_td_errors(**inputs)
    torch.testing.assert_close(before[:4, 1:], after[:4, 1:])
    assert not torch.isclose(before[3, 0], after[3, 0])


def test_the_online_network_chooses_and_the_target_network_values() -> None:
    online_q = torch.tensor([[[0.0, 0.0]], [[1.0, 2.0]]])
    target_q = torch.tensor([[[0.0, 0.0]], [[5.0, 3.0]]])
    targets = double_q_targets(
        online_q=online_q, target_q=target_q, rewards=torch.zeros(1, 1), discounts=torch.ones(1, 1), n=5
    )
    assert targets.item() == pytest.approx(3.0)


def test_td_errors_are_targets_minus_the_online_value_of_the_action() -> None:
    inputs = make_inputs()
    targets = double_q_targets(**{name: each for name, each in inputs.items() if name != "actions"})
    chosen = inputs["online_q"][:-1].gather(-1, inputs["actions"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(double_q_td_errors(**inputs), targets - chosen)


@pytest.mark.parametrize(
    ("x", "expected"), [(0.0, 0.0), (3.0, 1.003), (10.0, 2.326625), (100.0, 9.149876), (1000.0, 31.638584)]
)
def test_known_values_are_rescaled(x: float, expected: float) -> None:
    for sign in (1, -1):
        actual = rescale(torch.tensor(sign * x, dtype=torch.float64))
        assert actual.item() == pytest.approx(sign * expected, abs=5e-7)


@given(x=st.floats(-1e6, 1e6), epsilon=st.sampled_from([1e-3, 1e-2, 1.0]))
def test_rescaling_and_its_inverse_are_what_they_are_defined_as(x: float, epsilon: float) -> None:
    tensor = torch.tensor(x, dtype=torch.float64)
    assert rescale(tensor, epsilon).item() == pytest.approx(h(x, epsilon), rel=1e-9, abs=1e-12)
    assert unrescale(tensor, epsilon).item() == pytest.approx(h_inverse(x, epsilon), rel=1e-6, abs=1e-9)
    assert unrescale(rescale(tensor, epsilon), epsilon).item() == pytest.approx(x, rel=1e-12, abs=1e-300)


def test_float32_is_as_exact_as_it_can_be_for_small_and_for_large_values() -> None:
    x = torch.logspace(-6, 6, 400, dtype=torch.float64)
    x = torch.cat([-x, torch.zeros(1, dtype=torch.float64), x])
    single = x.float()
    torch.testing.assert_close(rescale(single).double(), rescale(single.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(unrescale(single).double(), unrescale(single.double()), rtol=1e-6, atol=0)


def test_no_gradient_passes_through_the_results() -> None:
    inputs = make_inputs()
    for name in ("online_q", "target_q", "rewards"):
        inputs[name].requires_grad_()
    assert not double_q_td_errors(**inputs).requires_grad
    del inputs["actions"]
    assert not double_q_targets(**inputs).requires_grad


def test_inputs_are_left_as_they_were() -> None:
    inputs = make_inputs()
    inputs["reset_steps"][1] = True
    copies = {name: each.clone() for name, each in inputs.items() if isinstance(each, Tensor)}
    double_q_td_errors(**inputs)
    for name, copy in copies.items():
        torch.testing.assert_close(inputs[name], copy, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["online_q", "target_q", "actions", "discounts", "reset_steps"])
def test_a_wrong_shape_is_named(name: str) -> None:
    inputs = make_inputs()
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match=name):
        double_q_td_errors(**inputs)


@pytest.mark.parametrize("change", [{"rewards": torch.zeros(8)}, {"rewards": torch.zeros(0, 3)}, {"n": 0}])
def test_sums_of_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        double_q_td_errors(**{**make_inputs(), **change})
