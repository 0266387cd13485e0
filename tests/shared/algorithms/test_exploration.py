import numpy as np
import pytest

from shared.algorithms.exploration import epsilon_ladder


def test_eight_environments_span_the_ladder() -> None:
    expected = [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096, 0.0016384, 0.00065536]
    np.testing.assert_allclose(epsilon_ladder(8), expected, rtol=1e-6)
    assert epsilon_ladder(8).dtype == np.float32


@pytest.mark.parametrize("count", [2, 3, 32, 257])
def test_every_group_spans_the_whole_ladder(count: int) -> None:
    ladder = epsilon_ladder(count)
    assert ladder[[0, -1]].tolist() == pytest.approx([0.4, 0.4**8])
    ratios = ladder[1:] / ladder[:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


def test_a_single_environment_explores_most() -> None:
    assert epsilon_ladder(1).tolist() == pytest.approx([0.4])
