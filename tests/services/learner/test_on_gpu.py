"""Updates on a GPU: the same as on the CPU, and batch after batch in the same memory."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.batches import TrainingBatch, staged
from services.learner.config import LearnerConfig
from services.learner.r2d2 import R2D2Trainer
from services.learner.rows import Slice
from services.learner.sequences import SequenceBatch, Shape, staged_sequences
from services.learner.session import _rng_state, _set_rng_state
from services.learner.training import VTraceTrainer
from shared.networks.build import build_network
from shared.specs import LeafSpec, RunSpec
from shared.types import Chunk
from tests.support.learner_chunks import make_chunk, make_spec

pytestmark = pytest.mark.gpu

FRAME = LeafSpec(name="observation", dtype="uint8", shape=(84, 84), low=(0.0,), high=(255.0,))
SHAPE = Shape(unroll=4, burn_in=4, trained=8)


def spec_of(network: str, lstm_size: int) -> RunSpec:
    return make_spec(network=network, lstm_size=lstm_size, frame_stack=4, observation=(FRAME,), actions=6)


def chunk_of(spec: RunSpec, rows: int, seed: int) -> Chunk:
    """With rewards, and episodes that begin anywhere."""
    random = np.random.default_rng(seed)
    state = build_network(spec).initial_state(rows)
    return replace(
        make_chunk(spec=spec, rows=rows, seed=seed, state=tuple(leaf.numpy() for leaf in state)),
        is_first=random.random((rows, spec.unroll + 1)) < 0.2,
        reward=random.normal(size=(rows, spec.unroll)).astype(np.float32),
    )


def batch_of(spec: RunSpec, device: torch.device, seed: int) -> TrainingBatch:
    return staged([Slice(chunk_of(spec, 8, seed), 1, 7)], reward_clip=1.0, device=device)


def sequences_of(spec: RunSpec, device: torch.device, seed: int) -> SequenceBatch:
    def chunk(row: int, number: int) -> Chunk:
        one = chunk_of(spec, 1, 100 * seed + 10 * row + number)
        header = replace(one.header, number=number)
        return replace(
            one, header=header, behaviour_logits=None, td_errors=np.zeros((1, spec.unroll), np.float32)
        )

    sequences = [[chunk(row, number) for number in range(SHAPE.chunks)] for row in range(3)]
    weights = np.array([0.5, 1.0, 0.7])
    return staged_sequences(sequences, weights, SHAPE, reward_clip=1.0, device=device)


def make_config(**settings: Any) -> LearnerConfig:
    return LearnerConfig(**{"precision": "float32", "learning_rate": 1e-3, **settings})


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize(
    ("network", "lstm_size"), [("impala_shallow", 0), ("impala_deep", 16), ("nature", 0)]
)
def test_updates_of_vtrace_are_those_of_the_cpu(network: str, lstm_size: int, optimizer: str) -> None:
    spec = spec_of(network, lstm_size)
    losses = []
    for device in map(torch.device, ("cpu", "cuda")):
        torch.manual_seed(0)
        # A GPU convolves in TF32. RMSProp at 1e-3 would make some 10 % of that within four updates.
        config = make_config(optimizer=optimizer, learning_rate=1e-4, normalize_advantages=True)
        trainer = VTraceTrainer(build_network(spec), config, device=device)
        metrics = [trainer.train(batch_of(spec, device, seed), steps=0) for seed in range(4)]
        losses.append([(each.policy_loss, each.baseline_loss, each.gradient_norm) for each in metrics])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03, atol=0.03)


def test_updates_of_r2d2_are_those_of_the_cpu() -> None:
    spec = replace(spec_of("impala_shallow", 16), agent="r2d2", unroll=SHAPE.unroll)
    found = []
    for device in map(torch.device, ("cpu", "cuda")):
        torch.manual_seed(0)
        config = make_config(
            agent="r2d2", optimizer="adam", unroll=SHAPE.unroll, burn_in=SHAPE.burn_in, sequence_length=8
        )
        trainer = R2D2Trainer(build_network(spec), config, device=device)
        updates = []
        for seed in range(3):
            loss = trainer.train(sequences_of(spec, device, seed), steps=0).total_loss
            updates.append([loss, *trainer.priorities])
        found.append(updates)
    np.testing.assert_allclose(found[1], found[0], rtol=0.03, atol=0.003)


def test_batch_after_batch_takes_the_memory_of_the_one_before() -> None:
    spec, device = spec_of("impala_shallow", 0), torch.device("cuda")
    trainer = VTraceTrainer(build_network(spec), make_config(), device=device)
    reserved = []
    for seed in range(40):
        trainer.train(batch_of(spec, device, seed), steps=0)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[4]


def test_the_random_numbers_of_the_device_go_on_where_they_were() -> None:
    device = torch.device("cuda")
    state = _rng_state(device)
    before = torch.rand(5, device=device)
    _set_rng_state(state, device)
    assert torch.equal(torch.rand(5, device=device), before)
