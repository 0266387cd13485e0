import math

import pytest
import torch

from shared.trees import put_together, taken_apart


def test_what_was_taken_apart_is_put_together_again() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": torch.ones(2, 3)}, 11: {}},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "foreach": None, "fused": True, "params": [0]}],
        "name": "adam",
        "limit": math.inf,
        "nothing": [(), [], {}],
    }
    tensors, structure = taken_apart(tree)
    assert len(tensors) == 2
    again = put_together(tensors, structure)
    state = again["state"]
    assert list(state) == [0, 11]
    assert torch.equal(state[0]["step"], torch.tensor(3.0))
    assert torch.equal(state[0]["momentum"], torch.ones(2, 3))
    assert {**again, "state": None} == {**tree, "state": None}


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), {(1, 2): 3}, {True: 1}, {"a": [1j]}])
def test_what_could_not_be_put_together_is_not_taken_apart(value: object) -> None:
    with pytest.raises(TypeError, match=r"not (set|bytes|object|tuple|bool|complex)"):
        taken_apart(value)


@pytest.mark.parametrize(
    "structure",
    [b"", b"\xff", b"{", b"{}", b'{"a": 1, "b": 2}', b'{"set": []}', b'{"tensor": "7"}', b'{"items": [1]}'],
)
def test_another_structure_is_refused(structure: bytes) -> None:
    with pytest.raises(ValueError, match="no structure of these tensors"):
        put_together({}, structure)
