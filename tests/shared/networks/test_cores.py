import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.networks.cores import CoreAndHeads, DuelingHeads, LstmCore, stretches
from shared.networks.interface import NetworkInput, State

FEATURES, ACTIONS, SIZE = 5, 3, 4


def make_core(seed: int = 0) -> LstmCore:
    torch.manual_seed(seed)
    return LstmCore(FEATURES, ACTIONS, SIZE)


def make_inputs(is_first: Tensor, seed: int = 0) -> tuple[Tensor, NetworkInput]:
    generator = torch.Generator().manual_seed(seed)
    shape = is_first.shape
    return torch.randn(*shape, FEATURES, generator=generator), NetworkInput(
        observation={},
        previous_action=torch.randint(ACTIONS, shape, generator=generator),
        previous_reward=torch.randn(shape, generator=generator),
        is_first=is_first,
    )


def by_definition(
    core: LstmCore, features: Tensor, inputs: NetworkInput, state: State
) -> tuple[Tensor, State]:
    """One environment and one step at a time, the LSTM's equations written out in float64."""
    w_in, w_hidden, b_in, b_hidden = (value.double() for value in core.lstm.parameters())
    steps, batch = inputs.is_first.shape
    outputs = torch.zeros(steps, batch, SIZE, dtype=torch.float64)
    states = [torch.zeros(batch, SIZE, dtype=torch.float64) for _ in range(2)]
    for b in range(batch):
        hidden, cell = (leaf[b].double() for leaf in state)
        for t in range(steps):
            if inputs.is_first[t, b]:
                hidden, cell = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
            action = torch.zeros(ACTIONS).double()
            action[inputs.previous_action[t, b]] = 1
            x = torch.cat([features[t, b].double(), inputs.previous_reward[t, b].double().view(1), action])
            gates = w_in @ x + b_in + w_hidden @ hidden + b_hidden
            i, f, g, o = gates.chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs[t, b] = hidden
        states[0][b], states[1][b] = hidden, cell
    return outputs, tuple(states)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_lstm_equals_its_equations_with_resets_anywhere(data: st.DataObject) -> None:
    steps, batch = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    rows = st.lists(st.booleans(), min_size=batch, max_size=batch)
    is_first = torch.tensor(data.draw(st.lists(rows, min_size=steps, max_size=steps)))
    core = make_core()
    features, inputs = make_inputs(is_first, seed=data.draw(st.integers(0, 100)))
    state = (torch.randn(batch, SIZE), torch.randn(batch, SIZE))
    with torch.no_grad():
        outputs, after = core(features, inputs, state)
        expected, expected_after = by_definition(core, features, inputs, state)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(after, expected_after, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_a_state_that_is_not_even_a_number_ends_with_its_episode() -> None:
    core = make_core()
    features, inputs = make_inputs(torch.tensor([[True], [False]]))
    strange = (torch.full((1, SIZE), torch.nan), torch.full((1, SIZE), torch.inf))
    outputs, _ = core(features, inputs, strange)
    torch.testing.assert_close(outputs, core(features, inputs, core.initial_state(1))[0])


def test_gradients_do_not_cross_an_episodes_start() -> None:
    core = make_core()
    is_first = torch.zeros(6, 2, dtype=torch.bool)
    is_first[3, 0] = True
    features, inputs = make_inputs(is_first)
    features.requires_grad_()
    outputs, _ = core(features, inputs, core.initial_state(2))
    (gradient,) = torch.autograd.grad(outputs[5].sum(), features)
    assert not gradient[:3, 0].any()
    assert gradient[3:, 0].any(dim=1).all()
    assert gradient[:, 1].any(dim=1).all()


def test_the_previous_action_and_reward_reach_the_output() -> None:
    core = make_core()
    features, inputs = make_inputs(torch.zeros(1, 1, dtype=torch.bool))
    before, _ = core(features, inputs, core.initial_state(1))
    other_action = inputs._replace(previous_action=(inputs.previous_action + 1) % ACTIONS)
    other_reward = inputs._replace(previous_reward=inputs.previous_reward + 1)
    for changed in (other_action, other_reward):
        assert not torch.allclose(before, core(features, changed, core.initial_state(1))[0])


def test_the_state_stays_float32_under_autocast() -> None:
    core = make_core()
    features, inputs = make_inputs(torch.zeros(3, 2, dtype=torch.bool))
    expected, _ = core(features, inputs, core.initial_state(2))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = core(features, inputs, core.initial_state(2))
    assert {outputs.dtype, *(leaf.dtype for leaf in state)} == {torch.float32}
    torch.testing.assert_close(outputs, expected)


def test_time_is_cut_only_where_some_row_starts_an_episode() -> None:
    is_first = torch.zeros(6, 3, dtype=torch.bool)
    is_first[0, :] = is_first[2, 1] = is_first[5, 0] = is_first[5, 2] = True
    assert stretches(is_first) == [(0, 2), (2, 5), (5, 6)]
    assert stretches(torch.ones(1, 3, dtype=torch.bool)) == [(0, 1)]
    assert stretches(torch.ones(3, 1, dtype=torch.bool)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("lstm_size", [0, 4])
def test_a_fresh_policy_is_nearly_uniform(lstm_size: int) -> None:
    torch.manual_seed(0)
    heads = CoreAndHeads(FEATURES, ACTIONS, lstm_size)
    features, inputs = make_inputs(torch.zeros(4, 2, dtype=torch.bool))
    output, _ = heads(features, inputs, heads.initial_state(2))
    assert output.policy_logits.softmax(-1).max() < 0.36


@pytest.mark.parametrize("hidden", [0, 7])
def test_q_values_are_the_value_plus_advantages_of_mean_zero(hidden: int) -> None:
    torch.manual_seed(0)
    heads = DuelingHeads(FEATURES, FEATURES, ACTIONS, hidden)
    features, others = torch.randn(4, 2, FEATURES), torch.randn(4, 2, FEATURES)
    with torch.no_grad():
        q_values = heads(features, others).q_values
        value, advantage = heads.value(others), heads.advantage(features)
    torch.testing.assert_close(q_values.mean(-1, keepdim=True), value)
    centred = advantage - advantage.mean(-1, keepdim=True)
    torch.testing.assert_close(q_values - value, centred, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(centred, torch.zeros(()))


def test_each_dueling_head_has_its_own_hidden_layer() -> None:
    shapes = [tuple(value.shape) for value in DuelingHeads(5, 6, 3, 512).parameters()]
    assert shapes == [(512, 5), (512,), (3, 512), (3,), (512, 6), (512,), (1, 512), (1,)]
    assert [tuple(value.shape) for value in DuelingHeads(5, 6, 3).parameters()] == [
        (3, 5),
        (3,),
        (1, 6),
        (1,),
    ]


@pytest.mark.parametrize("hidden", [0, 512])
@pytest.mark.parametrize("lstm_size", [0, 4])
def test_fresh_q_values_are_near_zero_and_float32_under_autocast(lstm_size: int, hidden: int) -> None:
    torch.manual_seed(0)
    heads = CoreAndHeads(FEATURES, ACTIONS, lstm_size, agent="r2d2", dueling_size=hidden)
    features, inputs = make_inputs(torch.zeros(4, 2, dtype=torch.bool))
    expected, _ = heads(features, inputs, heads.initial_state(2))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = heads(features, inputs, heads.initial_state(2))
    assert output.q_values.dtype == torch.float32
    torch.testing.assert_close(output.q_values, expected.q_values)
    assert output.q_values.abs().max() < 0.1
