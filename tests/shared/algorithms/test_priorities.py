import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shared.algorithms.priorities import importance_weights, sequence_priorities


@given(
    errors=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.floats(-9, 9, width=32)
    ),
    eta=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_priorities_equal_the_definition(errors: np.ndarray, eta: float, seed: int) -> None:
    valid = np.random.default_rng(seed).random(errors.shape) < 0.7
    actual = sequence_priorities(errors, valid, eta)
    for row, priority in enumerate(actual):
        counted = [abs(float(e)) for e, counts in zip(errors[row], valid[row], strict=True) if counts]
        expected = eta * max(counted) + (1 - eta) * sum(counted) / len(counted) if counted else 0.0
        assert priority == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_step_that_does_not_count_neither_raises_nor_lowers_the_priority() -> None:
    errors = np.array([[1.0, -3.0, 99.0]])
    priorities = sequence_priorities(errors, np.array([[True, True, False]]))
    assert priorities == pytest.approx([0.9 * 3 + 0.1 * 2])


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 0)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[n, L\]"):
        sequence_priorities(np.zeros(shape), np.ones((2, 0 if 0 in shape else 3), np.bool_))


@pytest.mark.parametrize(("alpha", "beta", "expected"), [(1.0, 1.0, [1, 1 / 3]), (0.7, 0.3, [1, 0.7940])])
def test_weights_of_two_priorities(alpha: float, beta: float, expected: list[float]) -> None:
    powers = np.array([0.3, 0.9]) ** alpha
    weights = importance_weights(powers / powers.sum(), 2, beta)
    np.testing.assert_allclose(weights, expected, atol=5e-5)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=9), st.integers(1, 10**6), st.floats(0, 1))
def test_weights_equal_the_definition(probabilities: list[float], size: int, beta: float) -> None:
    by_definition = [(1 / (size * p)) ** beta for p in probabilities]
    expected = [weight / max(by_definition) for weight in by_definition]
    np.testing.assert_allclose(importance_weights(np.array(probabilities), size, beta), expected)


def test_no_samples_have_no_weights() -> None:
    assert importance_weights(np.zeros(0), 5, 0.6).shape == (0,)
