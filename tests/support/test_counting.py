import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from shared.networks.unroll import network_input, next_history
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec
from tests.support.counting import CountingNetwork, Told, told
from tests.support.counting_environment import (
    CorridorEnvironment,
    CountingEnvironment,
    CountingVectorEnvironment,
    Crash,
    reward_of,
)

NUM_ACTIONS = 16


def counting_network(frame_stack: int) -> CountingNetwork:
    leaf = LeafSpec(name="observation", dtype="float32", shape=(3,), low=(0.0,), high=(2.0**20,))
    environment = EnvironmentSpec(observation=(leaf,), num_actions=NUM_ACTIONS)
    return CountingNetwork(environment=environment, network=NetworkSpec(name="", frame_stack=frame_stack))


def test_acting_in_lockstep_tells_the_same_count_and_step_everywhere() -> None:
    stack, batch = 3, 4
    network = counting_network(stack)
    environment = SyncVectorEnv(
        [lambda: CountingEnvironment(lengths=(2, 5, 1))] * batch, autoreset_mode=AutoresetMode.NEXT_STEP
    )
    observation, _ = environment.reset(seed=3)
    state = network.initial_state(batch)
    history = {"observation": torch.zeros(batch, stack - 1, 3)}
    is_first, ended = np.ones(batch, np.bool_), np.zeros(batch, np.bool_)
    action, reward = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch)
    for _ in range(30):
        inputs = network_input(
            frames={"observation": torch.from_numpy(observation.copy()).unsqueeze(1)},
            history=history,
            is_first=torch.from_numpy(is_first).unsqueeze(1),
            previous_action=action,
            previous_reward=reward,
            reward_clip=0.0,
        )
        output, state = network(inputs, state)
        history = {"observation": next_history(inputs.observation["observation"][0])}
        say = told(output.policy_logits[0].detach(), stack)
        assert say.count.tolist() == (observation[:, 2] - 1).tolist()
        assert np.stack([say.instance, say.episode, say.step], 1).tolist() == observation.tolist()
        assert say.action.tolist() == [(row[0] + row[2] - 1) % NUM_ACTIONS for row in observation.tolist()]
        expected = [[max(0, step - 2), max(0, step - 1), step] for step in observation[:, 2].tolist()]
        assert say.stacked_steps.tolist() == expected
        check_previous(say, observation, is_first)

        action = say.action
        observation, rewards, terminated, truncated, _ = environment.step(action.numpy())
        reward = torch.from_numpy(rewards).float()
        is_first, ended = ended, terminated | truncated
    assert set(say.instance.tolist()) == {4, 5, 6, 7}


def check_previous(say: Told, observation: np.ndarray, is_first: np.ndarray) -> None:
    for row, (instance, episode, step) in enumerate(observation.tolist()):
        if is_first[row]:
            assert (say.previous_action[row], say.previous_reward[row]) == (0, 0)
            continue
        action = (instance + step - 2) % NUM_ACTIONS
        assert say.previous_action[row] == action
        assert say.previous_reward[row] == reward_of((instance, episode, step - 1), int(action))


def test_learning_does_not_change_what_the_counting_network_tells() -> None:
    network = counting_network(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    inputs = network_input(
        frames={"observation": torch.ones(1, 1, 3)},
        history={},
        is_first=torch.tensor([[True]]),
        previous_action=torch.tensor([0]),
        previous_reward=torch.tensor([0.0]),
        reward_clip=0.0,
    )
    before, _ = network(inputs, network.initial_state(1))
    (before.policy_logits.sum() + before.baseline.sum()).backward()
    optimizer.step()
    after, _ = network(inputs, network.initial_state(1))
    assert torch.equal(before.policy_logits, after.policy_logits)


def test_environments_are_made_by_module_and_id() -> None:
    for name in ("Counting-v0", "Corridor-v0"):
        gymnasium.make(f"tests.support.counting_environment:{name}").close()
    vector = gymnasium.make_vec(
        "tests.support.counting_environment:CountingVector-v0",
        num_envs=2,
        vectorization_mode="vector_entry_point",
    )
    assert vector.num_envs == 2


def test_an_episode_has_its_length_in_steps_and_ends_as_told() -> None:
    environment = CountingEnvironment(lengths=[2, 1], truncate=True, dtype="int64")
    first, _ = environment.reset(seed=8)
    assert (first.dtype, first.tolist()) == (np.int64, [9, 1, 1])
    assert environment.step(np.int64(3))[1:4] == (9101.1875, False, False)
    last, reward, terminated, truncated, _ = environment.step(np.int64(0))
    assert (last.tolist(), reward, terminated, truncated) == ([9, 1, 3], 9102.0, False, True)
    assert environment.reset()[0].tolist() == [9, 2, 1]
    assert environment.step(np.int64(0))[3]
    with pytest.raises(ValueError, match="after the episode's end"):
        environment.step(np.int64(0))


def test_environments_without_a_seed_are_different_instances() -> None:
    assert CountingEnvironment().reset()[0][0] != CountingEnvironment().reset()[0][0]


def test_it_crashes_where_it_was_told_to() -> None:
    environment = CountingEnvironment(lengths=[10], crash_at=2)
    environment.reset()
    environment.step(np.int64(0))
    with pytest.raises(Crash):
        environment.step(np.int64(0))


@pytest.mark.parametrize("life_every", [0, 2])
def test_the_vector_environment_steps_as_gymnasiums_and_only_adds_lost_lives(life_every: int) -> None:
    ours = CountingVectorEnvironment(3, lengths=(3, 1, 5), life_every=life_every)
    theirs = SyncVectorEnv(
        [lambda: CountingEnvironment(lengths=(3, 1, 5))] * 3, autoreset_mode=AutoresetMode.NEXT_STEP
    )
    assert ours.reset(seed=1)[0].tolist() == theirs.reset(seed=1)[0].tolist()
    _, info = ours.reset(seed=1)
    theirs.reset(seed=1)
    earlier, ended = info["frame_number"] - info["episode_frame_number"], np.zeros(3, np.bool_)
    lives = 0
    for t in range(25):
        actions = np.full(3, t % NUM_ACTIONS)
        observation, reward, terminated, truncated, info = ours.step(actions)
        expected, expected_reward, really_terminated, really_truncated, _ = theirs.step(actions)
        assert observation.tolist() == expected.tolist()
        assert reward.tolist() == expected_reward.tolist()
        assert truncated.tolist() == really_truncated.tolist()
        assert terminated[really_terminated].all()
        lives += int((terminated & ~really_terminated).sum())
        assert info["is_first"].tolist() == ended.tolist()
        now = info["frame_number"] - info["episode_frame_number"]
        assert (now > earlier).tolist() == ended.tolist()
        earlier, ended = now, really_terminated | really_truncated
    assert (lives > 0) == (life_every > 0)


@pytest.mark.parametrize("cues", [2, 4])
def test_a_corridor_pays_one_for_the_cue_at_its_end_and_nothing_else(cues: int) -> None:
    environment = CorridorEnvironment(length=3, cues=cues)
    for seed in range(8):
        first, _ = environment.reset(seed=seed)
        cue = int(first.argmax())
        assert first.tolist() == [float(k == cue) for k in range(cues)] + [0.0]
        for t in range(3):
            observation, reward, terminated, *_ = environment.step(np.int64(cue))
            assert observation.tolist() == [0.0] * cues + [float(t == 2)]
            assert (reward, terminated) == (0.0, False)
        answer = cue if seed % 2 else (cue + 1) % cues
        _, reward, terminated, truncated, _ = environment.step(np.int64(answer))
        assert (reward, terminated, truncated) == (float(answer == cue), True, False)
