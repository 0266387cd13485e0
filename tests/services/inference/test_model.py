import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.inference.assembler import StepArrays
from services.inference.model import Model, PackedBatch
from services.inference.staging import Staging
from shared.errors import RunError
from shared.networks.build import build_network
from shared.networks.interface import NetworkInput, NetworkOutput, Output, State
from shared.networks.mlp import MlpNetwork
from shared.specs import Agent, EnvironmentSpec, LeafSpec, NetworkSpec, RunSpec

ACTIONS = 3


def make_spec(
    *,
    lstm_size: int = 0,
    frame_stack: int = 1,
    name: str = "mlp",
    image: bool = False,
    agent: Agent = "vtrace",
) -> RunSpec:
    leaf = (
        LeafSpec(name="observation", dtype="uint8", shape=(40, 40), low=(0.0,), high=(255.0,))
        if image
        else LeafSpec(name="observation", dtype="float32", shape=(4,), low=(-1.0,), high=(1.0,))
    )
    return RunSpec(
        environment=EnvironmentSpec(observation=(leaf,), num_actions=ACTIONS),
        network=NetworkSpec(name=name, lstm_size=lstm_size, frame_stack=frame_stack, hidden_sizes=(16,)),
        agent=agent,
        unroll=5,
        reward_clip=0.0,
    )


Make = Callable[..., Model]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Model] = []

    def model(spec: RunSpec, *, seed: int = 0, precision: str = "float32") -> Model:
        torch.manual_seed(1)
        network = build_network(spec)
        made.append(Model(spec, network, device=torch.device("cpu"), precision=precision, seed=seed))  # type: ignore[arg-type]
        return made[-1]

    yield model
    for each in reversed(made):  # each restores what was there when it first ran
        each.close()
    assert not torch.is_autocast_enabled("cpu")


def batch(
    spec: RunSpec,
    rows: int,
    *,
    first: bool = True,
    greedy: bool = False,
    epsilon: float = 0.0,
    slots: list[int] | None = None,
    value: int = 1,
) -> PackedBatch:
    """`rows` equal observations."""
    leaf = spec.environment.observation[0]
    staging = Staging(spec.environment, rows=rows, pinned=False)
    step = StepArrays(
        observation={leaf.name: np.full((rows, *leaf.shape), value, leaf.dtype)},
        reward=np.ones(rows, np.float32),
        terminated=np.zeros(rows, np.bool_),
        truncated=np.zeros(rows, np.bool_),
        is_first=np.full(rows, first),
    )
    staging.place(
        0, step, slots=np.array(slots or range(rows)), greedy=greedy, epsilon=np.full(rows, epsilon)
    )
    return PackedBatch(staging, rows, None)


def test_train_rows_are_samples_of_the_softmax(make: Make) -> None:
    spec = make_spec()
    model = make(spec)
    uneven = build_network(spec).state_dict()
    uneven[next(name for name in uneven if name.endswith("policy.bias"))] = torch.tensor([0.0, 1.0, -2.0])
    model.load(uneven, version=1, update=1)
    answers = model.run(batch(spec, 20_000))
    expected = torch.softmax(torch.from_numpy(answers.logits[0]), 0).numpy()
    assert expected.max() > 0.6
    assert expected.min() < 0.05
    found = np.bincount(answers.action, minlength=ACTIONS) / 20_000
    np.testing.assert_allclose(found, expected, atol=0.015)
    assert answers.action.dtype == np.int64
    assert answers.logits.dtype == np.float32


def test_eval_rows_take_the_likeliest_action(make: Make) -> None:
    spec = make_spec()
    answers = make(spec).run(batch(spec, 500, greedy=True))
    np.testing.assert_array_equal(answers.action, answers.logits.argmax(axis=1))


def test_train_and_eval_rows_share_a_batch(make: Make) -> None:
    spec = make_spec()
    model = make(spec)
    mixed = batch(spec, 400)
    mixed.staging.greedy[:200] = True
    action = model.run(mixed).action
    assert len(set(action[:200])) == 1
    assert len(set(action[200:])) == ACTIONS


def test_the_same_seed_samples_the_same_actions(make: Make) -> None:
    spec = make_spec()
    runs = [make(spec, seed=seed).run(batch(spec, 100)).action for seed in (5, 5, 6)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_new_weights_act_from_the_next_batch_on(make: Make, precision: str) -> None:
    spec = make_spec(name="impala_shallow", image=True)
    model = make(spec, precision=precision)
    model.run(batch(spec, 2))
    torch.manual_seed(2)
    other = build_network(spec).state_dict()
    model.load(other, version=9, update=90)
    answers = model.run(batch(spec, 2))
    assert (answers.weights_version, answers.weights_update) == (9, 90)
    fresh = make(spec, precision=precision)
    fresh.load(other, version=1, update=1)
    np.testing.assert_array_equal(answers.logits, fresh.run(batch(spec, 2)).logits)


def test_weights_of_another_network_are_refused_by_name(make: Make) -> None:
    spec = make_spec()
    model = make(spec)
    weights = build_network(spec).state_dict()
    name = next(iter(weights))
    model.check(weights)
    with pytest.raises(RunError, match=name):
        model.check({**weights, name: torch.zeros(3, 3)})
    with pytest.raises(RunError, match="weights have nothing"):
        model.check({each: tensor for each, tensor in weights.items() if each != name})
    with pytest.raises(RunError, match="'more'"):
        model.check({**weights, "more": torch.zeros(1)})


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 1], [70, 5, 300]])
def test_a_slot_remembers_wherever_it_is(make: Make, slots: list[int]) -> None:
    spec = make_spec(lstm_size=8, frame_stack=3)
    straight, scattered = make(spec), make(spec)
    for step in range(4):
        one = straight.run(batch(spec, 3, first=step == 0, value=step))
        other = scattered.run(batch(spec, 3, first=step == 0, value=step, slots=slots))
        np.testing.assert_array_equal(one.logits, other.logits)


def test_environments_may_meet_in_any_order(make: Make) -> None:
    spec = make_spec(lstm_size=8, frame_stack=3)
    straight, mixed = make(spec), make(spec)
    staging = Staging(spec.environment, rows=3, pinned=False)
    leaf = spec.environment.observation[0]
    for step, order in enumerate([[0, 1, 2], [2, 0, 1], [1, 0, 2], [0, 1, 2], [2, 0, 1]]):
        logits = []
        for model, slots in ((straight, [0, 1, 2]), (mixed, order)):
            packed = batch(spec, 3, first=step == 0, greedy=True, slots=slots)
            value = np.array(slots, leaf.dtype).reshape(-1, *[1] * len(leaf.shape))
            packed.staging.observation(3)[leaf.name].numpy()[...] = value
            if model is mixed:
                staging.slots_array[:] = packed.staging.slots_array
                packed.staging.slots_array = staging.slots_array  # the memory of the batch before
            logits.append(model.run(packed).logits)
        np.testing.assert_allclose(logits[1], logits[0][order], atol=1e-6)


def test_what_is_remembered_outlives_more_slots(make: Make) -> None:
    spec = make_spec(lstm_size=8, frame_stack=3)
    small, grown = make(spec), make(spec)
    for model in (small, grown):
        model.run(batch(spec, 2))
    grown.run(batch(spec, 1, slots=[1000]))
    np.testing.assert_array_equal(
        small.run(batch(spec, 2, first=False)).logits, grown.run(batch(spec, 2, first=False)).logits
    )


def test_a_first_step_forgets_what_was_before(make: Make) -> None:
    spec = make_spec(lstm_size=8, frame_stack=3)
    model = make(spec)
    fresh = model.run(batch(spec, 2)).logits
    for _ in range(3):
        model.run(batch(spec, 2, first=False, value=7))
    np.testing.assert_array_equal(model.run(batch(spec, 2)).logits, fresh)


def test_logits_are_float32_in_bfloat16_too(make: Make) -> None:
    spec = make_spec(name="impala_shallow", image=True, lstm_size=8)
    answers = make(spec, precision="bfloat16").run(batch(spec, 2))
    assert answers.logits.dtype == np.float32


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_q_learning_takes_any_action_with_probability_epsilon_and_else_the_best(
    make: Make, epsilon: float
) -> None:
    spec = make_spec(agent="r2d2")
    answers = make(spec).run(batch(spec, 20_000, epsilon=epsilon))
    found = np.bincount(answers.action, minlength=ACTIONS) / 20_000
    expected = np.full(ACTIONS, epsilon / ACTIONS)
    expected[answers.logits[0].argmax()] += 1 - epsilon
    np.testing.assert_allclose(found, expected, atol=0.015 if epsilon else 0)
    assert answers.action.dtype == np.int64


def test_the_same_seed_explores_with_the_same_actions(make: Make) -> None:
    spec = make_spec(agent="r2d2")
    runs = [make(spec, seed=seed).run(batch(spec, 100, epsilon=0.5)).action for seed in (5, 5, 6)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_q_values_are_float32_in_bfloat16_too_and_those_of_the_network(make: Make) -> None:
    spec = make_spec(name="impala_shallow", image=True, agent="r2d2")
    answers = make(spec, precision="bfloat16").run(batch(spec, 2))
    expected = make(spec).run(batch(spec, 2)).logits
    assert answers.logits.dtype == np.float32
    np.testing.assert_allclose(answers.logits, expected, rtol=0.1, atol=2e-3)
    assert answers.logits.shape == (2, ACTIONS)


class Delay(nn.Module):
    """Tells the reward of two steps ago, by passing it through two leaves of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def initial_state(self, batch_size: int) -> State:
        return torch.zeros(batch_size, 1), torch.zeros(batch_size, 1)

    def forward(self, inputs: NetworkInput, state: State) -> tuple[NetworkOutput, State]:
        newest = inputs.previous_reward[0].unsqueeze(1)
        logits = state[1].expand(-1, ACTIONS).unsqueeze(0)
        return NetworkOutput(logits, inputs.previous_reward), (newest, state[0])


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 1]])
def test_a_network_may_return_parts_of_the_state_that_it_was_given(slots: list[int]) -> None:
    spec = make_spec()
    model = Model(spec, Delay(), device=torch.device("cpu"), precision="float32", seed=0)  # type: ignore[arg-type]
    answers = []
    for step in range(6):
        stepped = batch(spec, 3, first=step == 0, slots=slots)
        stepped.staging.reward[:] = step
        answers.append(model.run(stepped))
    model.close()
    assert [answer.logits[0, 0] for answer in answers] == [0, 0, 0, 1, 2, 3]


def test_only_what_is_quick_in_float32_may_run_anywhere(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_quick(precision: str, seconds: float) -> bool:
        for clock in ("perf_counter", "thread_time"):
            monkeypatch.setattr(f"services.inference.model.{clock}", itertools.count(0.0, seconds).__next__)
        made = make(spec, precision=precision)
        for step in range(32):
            assert not made.is_quick
            made.run(batch(spec, 3, first=step == 0))
        return made.is_quick

    spec = make_spec()
    assert is_quick("float32", 0.0001)
    assert not is_quick("float32", 0.001)
    assert not is_quick("bfloat16", 0.0001), "its copies of the weights belong to the thread that made them"


class FailsLater(MlpNetwork):
    fails = False

    def forward(self, inputs: NetworkInput, state: State) -> tuple[Output, State]:
        if self.fails:
            raise ValueError("mask is all False")
        return super().forward(inputs, state)


def test_what_a_users_network_raises_names_the_network(make: Make) -> None:
    spec = make_spec(name=f"{__name__}:FailsLater")
    model = make(spec)
    model.run(batch(spec, 2))
    model._network.fails = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=f"network {__name__}:FailsLater: ValueError: mask is all False"):
        model.run(batch(spec, 2, first=False))
