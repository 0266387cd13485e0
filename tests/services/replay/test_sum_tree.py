import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.replay.sum_tree import SumTree

CAPACITIES = st.one_of(st.integers(1, 9), st.integers(60, 200))
WEIGHTS = st.one_of(st.just(0.0), st.floats(1e-300, 1e100), st.floats(0.1, 10.0))
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def filled(weights: list[float]) -> SumTree:
    tree = SumTree(len(weights))
    tree.set(np.arange(len(weights)), np.array(weights))
    return tree


@given(st.data(), CAPACITIES)
def test_weights_and_total_are_those_of_a_plain_list(data: st.DataObject, capacity: int) -> None:
    tree, oracle = SumTree(capacity), [0.0] * capacity
    pairs = st.lists(st.tuples(st.integers(0, capacity - 1), st.floats(0, 1e6)), max_size=20)
    for update in data.draw(st.lists(pairs, max_size=6)):
        tree.set(np.array([leaf for leaf, _ in update], np.int64), np.array([value for _, value in update]))
        for leaf, value in update:
            oracle[leaf] = value
    assert tree.get(np.arange(capacity)).tolist() == oracle
    assert tree.total == pytest.approx(sum(oracle), rel=1e-12)


def test_of_a_leaf_named_twice_the_last_weight_counts() -> None:
    tree = SumTree(5)
    tree.set(np.array([3, 1, 3]), np.array([7.0, 1.0, 2.0]))
    assert tree.get(np.array([3, 1])).tolist() == [2.0, 1.0]
    assert tree.total == 3.0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=150))
def test_every_prefix_finds_the_leaf_that_a_running_sum_finds(weights: list[int]) -> None:
    if not sum(weights):
        return
    expected = [leaf for leaf, weight in enumerate(weights) for _ in range(weight)]
    found = filled([float(weight) for weight in weights]).find(np.arange(sum(weights)))
    assert found.tolist() == expected


@given(st.lists(WEIGHTS, min_size=1, max_size=150), SHARES)
def test_a_leaf_without_weight_is_never_found(weights: list[float], shares: list[float]) -> None:
    tree = filled(weights)
    if tree.total <= 0:
        return
    above = [tree.total, np.nextafter(tree.total, np.inf), 2 * tree.total, np.inf]
    found = tree.find(np.array([share * tree.total for share in shares] + above))
    assert (tree.get(found) > 0).all()


@given(st.integers(1, 200), st.data())
def test_what_lies_beyond_the_total_finds_the_last_leaf_with_a_weight(
    capacity: int, data: st.DataObject
) -> None:
    weights = np.zeros(capacity)
    weights[data.draw(st.lists(st.integers(0, capacity - 1), min_size=1))] = 0.1
    tree = filled(weights.tolist())
    beyond = np.array([tree.total, np.nextafter(tree.total, np.inf), 2 * tree.total, np.inf])
    assert (tree.find(beyond) == np.flatnonzero(weights)[-1]).all()


def test_rounding_does_not_accumulate() -> None:
    rng = np.random.default_rng(0)
    tree = SumTree(100)
    for _ in range(300):
        tree.set(rng.integers(0, 100, 40), 10.0 ** rng.integers(-12, 12, 40))
    tree.set(np.arange(99), np.zeros(99))
    tree.set(np.array([99]), np.array([0.1]))
    assert tree.total == 0.1


@pytest.mark.parametrize(
    ("leaves", "values", "words"),
    [
        ([5], [1.0], "leaves are 0 to 4"),
        ([-1], [1.0], "leaves are 0 to 4"),
        ([0, 1], [1.0, np.nan], "finite"),
        ([0, 1], [1.0, np.inf], "finite"),
        ([0, 1], [1.0, -1.0], "negative"),
        ([0, 1], [1.0], "as many weights"),
    ],
)
def test_what_is_no_weight_is_refused_and_changes_nothing(
    leaves: list[int], values: list[float], words: str
) -> None:
    tree = filled([1.0] * 5)
    with pytest.raises(ValueError, match=words):
        tree.set(np.array(leaves), np.array(values))
    assert tree.get(np.arange(5)).tolist() == [1.0] * 5


@pytest.mark.parametrize("prefix", [-1e-9, np.nan])
def test_a_prefix_that_is_none_is_refused(prefix: float) -> None:
    with pytest.raises(ValueError, match="negative"):
        filled([1.0]).find(np.array([prefix]))


def test_an_empty_tree_has_nothing_to_find() -> None:
    with pytest.raises(ValueError, match="no leaf has a weight"):
        SumTree(3).find(np.array([0.0]))
    with pytest.raises(ValueError, match="at least one leaf"):
        SumTree(0)
