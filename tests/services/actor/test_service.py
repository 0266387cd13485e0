"""A whole actor against a scripted inference service, in this process."""

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs

from services.actor import group, service
from services.actor.config import ActorConfig
from services.actor.restarting import EnvironmentCrashed, EnvironmentHangs
from services.actor.service import group_seeds
from shared.errors import Refused, SeedrlError, UnsupportedEnvironment
from shared.wire import inference_pb2 as pb
from tests.support.counting_environment import reward_of
from tests.support.scripted_inference import RecordedStream, ScriptedInference, scripted_inference
from tests.support.waiting import eventually

COUNTING = "tests.support.counting_environment:Counting-v0"
TROUBLE = "tests.support.actor_environments:Trouble-v0"
SLOW = "tests.support.actor_environments:Slow-v0"

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


@pytest.fixture(params=["grpc", pytest.param("pipes", marks=LINUX)])
async def inference(request: pytest.FixtureRequest) -> AsyncIterator[ScriptedInference]:
    """Its messages after the Welcome go through either."""
    async with scripted_inference(takes_pipes=request.param == "pipes") as server:
        yield server


class Actor:
    """A running actor; `stop` ends it."""

    def __init__(self, config: ActorConfig) -> None:
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(service.run(config, stop=self.stop))
        self._url: str = ""

    async def ended(self, timeout: float = 10) -> None:
        """Waits for its end; raises its one error."""
        try:
            async with asyncio.timeout(timeout):
                await self.task
        except BaseExceptionGroup as errors:
            while isinstance(errors, BaseExceptionGroup):
                (errors,) = errors.exceptions  # type: ignore[assignment]
            raise errors from None


@contextlib.asynccontextmanager
async def acting(inference: ScriptedInference, env: str = COUNTING, **options: Any) -> AsyncIterator[Actor]:
    defaults = {"groups": 1, "group_size": 3, "actor_id": "a", "seed": 1}
    config = ActorConfig(env=env, inference_url=inference.address, **{**defaults, **options})
    actor = Actor(config)
    try:
        yield actor
    finally:
        actor.stop.set()
        if not actor.task.done():
            await actor.ended()


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def metric(port: int, name: str) -> float:
    _, text = await get(port, "/metrics")
    lines = [line for line in text.splitlines() if line.startswith(f"seedrl_actor_{name} ")]
    return float(lines[0].rpartition(" ")[2])


def _check_counting(stream: RecordedStream, actions: Any) -> None:
    """Rewards follow from the observation before and the action sent; is_first from the ends."""
    observation, is_first = stream.observation(), stream.flags("is_first")
    assert is_first[0].all()
    for t in range(1, len(stream.steps)):
        for row in range(stream.size):
            before = observation[t - 1, row]
            expected = 0.0 if is_first[t, row] else reward_of(before, actions(t - 1)[row])
            assert stream.rewards()[t, row] == expected
            assert is_first[t, row] == (observation[t, row, 2] == 1)
    assert [step.sequence for step in stream.steps] == list(range(len(stream.steps)))


async def test_steps_follow_the_actions_that_inference_sent(inference: ScriptedInference) -> None:
    def actions(t: int) -> Any:
        return (np.arange(3) * 5 + t) % 16

    inference.script = lambda _, step: actions(step.sequence)
    async with acting(inference):
        stream = await inference.steps(80)
    assert stream.hello is not None
    assert (stream.hello.actor_id, stream.hello.task, stream.hello.group_size) == ("a", "Counting-v0", 3)
    assert stream.hello.role == pb.ROLE_TRAIN
    _check_counting(stream, actions)
    assert stream.flags("is_first")[1:].sum() > 20


@LINUX
async def test_observations_lie_in_the_memory_that_inference_took(
    inference: ScriptedInference, free_port: int
) -> None:
    inference.takes_memory = True
    inference.script = lambda stream, step: (
        None if step.sequence == 30 and stream is inference.streams[0] else np.zeros(3, np.int64)
    )
    async with acting(inference, http_port=free_port):
        await eventually(lambda: len(inference.streams) == 2)
        await inference.steps(60, stream=1)
        status = json.loads((await get(free_port, "/status"))[1])
    assert status["groups"][0]["shared_memory"] is True
    for stream in inference.streams:  # each with memory of its own
        _check_counting(stream, lambda _: np.zeros(3, np.int64))


async def test_memory_is_offered_unless_it_is_not_to_be(inference: ScriptedInference) -> None:
    async with acting(inference, shared_memory=False):
        stream = await inference.steps(5)
    assert stream.hello is not None
    assert not stream.hello.HasField("shared_memory")
    assert all(step.observation for step in stream.steps)


@LINUX
async def test_the_end_of_the_call_ends_a_stream_whose_pipes_stay_open() -> None:
    async with scripted_inference(takes_pipes=True) as inference:
        inference.holds_pipes = True
        inference.script = lambda stream, step: (
            None if step.sequence == 5 and stream is inference.streams[0] else np.zeros(3, np.int64)
        )
        async with acting(inference) as actor:
            await inference.steps(8, stream=0 if len(inference.streams) > 1 else -1)
            inference.end_after = 1
            await actor.ended()
        for stream in inference.streams:
            assert stream.pipes is not None
            stream.pipes.close()


async def test_every_group_has_a_stream_and_other_seeds(inference: ScriptedInference) -> None:
    async with acting(inference, groups=3, group_size=2):
        await eventually(lambda: len(inference.streams) == 3)
        for index in range(3):
            await inference.steps(5, stream=index)
    hellos = [stream.hello for stream in inference.streams if stream.hello]
    assert len({hello.stream_id for hello in hellos}) == 3
    instances = {float(value) for stream in inference.streams for value in stream.observation()[0, :, 0]}
    assert len(instances) == 6


async def test_while_one_group_waits_for_its_actions_another_one_steps(inference: ScriptedInference) -> None:
    let_first_go = asyncio.Event()

    async def script(stream: RecordedStream, step: pb.Step) -> Any:
        if stream is inference.streams[0] and step.sequence == 3:
            await let_first_go.wait()
        return np.zeros(stream.size, np.int64)

    inference.script = script
    async with acting(inference, groups=2):
        await inference.steps(4, stream=0)
        await inference.steps(40, stream=1)
        assert len(inference.streams[0].steps) == 4
        let_first_go.set()
        await inference.steps(10, stream=0)


async def test_a_stream_is_half_closed_when_the_actor_stops_also_while_it_waits_for_actions(
    inference: ScriptedInference,
) -> None:
    async with acting(inference, groups=2) as actor:
        await eventually(lambda: len(inference.streams) == 2)
        await inference.steps(3, stream=0)
        inference.let_go.clear()
        await asyncio.sleep(0)
        await eventually(lambda: all(len(stream.steps) for stream in inference.streams))
        actor.stop.set()
        await asyncio.sleep(0)
        inference.let_go.set()
        await actor.ended(5)
    await eventually(lambda: [stream.end for stream in inference.streams] == ["half-closed"] * 2)


async def test_stopping_does_not_wait_for_actions_that_never_come(inference: ScriptedInference) -> None:
    async with acting(inference) as actor:
        await inference.steps(2)
        inference.let_go.clear()
        await eventually(lambda: inference.total_steps)
        actor.stop.set()
        await actor.ended(5)


async def test_stopping_does_not_wait_for_a_long_step(inference: ScriptedInference) -> None:
    async with acting(inference, SLOW, env_kwargs={"seconds": 30.0}) as actor:
        await inference.steps(1)
        actor.stop.set()
        await actor.ended(10)
    await eventually(lambda: inference.streams[0].end == "half-closed")


async def test_an_actor_comes_back_when_inference_does_with_a_fresh_stream_and_new_episodes(
    inference: ScriptedInference, free_port: int
) -> None:
    async with acting(inference, http_port=free_port):
        first = await inference.steps(3)
        await inference.die()
        await eventually(lambda: _ready(free_port, 503))
        _, text = await get(free_port, "/readyz")
        assert f"inference at {inference.address}" in text
        await inference.start()
        await eventually(lambda: len(inference.streams) > 1, timeout=10)
        again = await inference.steps(5)
        assert await metric(free_port, "reconnections_total") == 1
        assert (await get(free_port, "/readyz"))[0] == 200
    assert first.hello is not None
    assert again.hello is not None
    assert first.hello.stream_id != again.hello.stream_id
    assert again.flags("is_first")[0].all()
    assert again.steps[0].sequence == 0
    assert (again.observation()[0, :, 2] == 1).all()
    assert (again.observation()[0, :, 0] == first.observation()[0, :, 0]).all()  # the same environments
    assert (again.observation()[0, :, 1] > first.observation()[0, :, 1]).all()


async def _ready(port: int, status: int) -> bool:
    return (await get(port, "/readyz"))[0] == status


async def test_an_actor_may_start_before_inference(free_port: int) -> None:
    async with scripted_inference() as server:
        await server.die()
        async with acting(server, http_port=free_port):
            await eventually(lambda: _http(free_port))
            await eventually(lambda: _awaits(free_port, "inference at "))
            await server.start()
            await server.steps(2)


async def _awaits(port: int, what: str) -> bool:
    status, text = await get(port, "/readyz")
    return status == 503 and all(reason.startswith(what) for reason in json.loads(text)["reasons"])


async def _http(port: int) -> bool:
    try:
        return bool(await get(port, "/healthz"))
    except aiohttp.ClientError:
        return False


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"]
)
async def test_a_refused_hello_is_final_and_told_in_the_servers_words(
    inference: ScriptedInference, code: str
) -> None:
    inference.refuse = (grpc.StatusCode[code], "the run has 6 actions, this environment 16")
    async with acting(inference) as actor:
        with pytest.raises(Refused, match=f"{inference.address} refused.*{code}: the run has 6 actions"):
            await actor.ended()
    assert len(inference.streams) == 1


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"])
async def test_another_end_of_hello_is_tried_again(inference: ScriptedInference, code: str) -> None:
    with capture_logs() as logs:
        inference.refuse = (grpc.StatusCode[code], "full")
        async with acting(inference):
            for count in range(1, 4):
                await eventually(lambda count=count: len(inference.streams) >= count)
                inference.refuse = (grpc.StatusCode[code], f"full: {4096 + count} environments")
            inference.refuse = None
            await inference.steps(3)
    said = [event["event"] for event in logs if event.get("group") == 0]
    assert said == ["no stream to inference; trying again", "connected"]  # once, though the details change


async def test_a_hello_without_an_answer_is_given_up_and_tried_again(
    inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(group, "WELCOME_SECONDS", 0.2)
    inference.mute = True
    async with acting(inference, http_port=free_port):
        await eventually(lambda: len(inference.streams) >= 2)
        assert "no answer to Hello in 0.2 s" in (await get(free_port, "/readyz"))[1]
        inference.mute = False
        await inference.steps(3)


async def test_a_rejected_step_is_counted_and_a_fresh_stream_follows(
    inference: ScriptedInference, free_port: int
) -> None:
    inference.reject = (grpc.StatusCode.INVALID_ARGUMENT, "step.reward: row 1 is nan")
    async with acting(inference, http_port=free_port):
        await eventually(lambda: len(inference.streams) >= 3)
        inference.reject = None
        stream = await inference.steps(3)
        assert await metric(free_port, "rejected_steps_total") >= 2
    assert stream.flags("is_first")[0].all()


@pytest.mark.parametrize(
    "answer",
    [
        pb.ActResponse(actions=pb.Actions(sequence=99, action=bytes(24))),
        pb.ActResponse(actions=pb.Actions(sequence=2, action=bytes(16))),
        pb.ActResponse(actions=pb.Actions(sequence=2, action=np.array([0, 16, 0], "<i8").tobytes())),
        pb.ActResponse(welcome=pb.Welcome(protocol_version=1, run_id="default")),
    ],
)
async def test_an_answer_that_breaks_the_protocol_is_not_acted_on(
    inference: ScriptedInference, answer: pb.ActResponse
) -> None:
    def script(stream: RecordedStream, step: pb.Step) -> Any:
        if stream is inference.streams[0] and step.sequence == 2:
            return answer
        return np.zeros(3, np.int64)

    inference.script = script
    async with acting(inference):
        await eventually(lambda: len(inference.streams) == 2)
        await inference.steps(3)
    assert len(inference.streams[0].steps) == 3
    await eventually(lambda: inference.streams[0].end == "half-closed")


async def test_another_runs_welcome_is_refused(inference: ScriptedInference) -> None:
    inference.welcome = pb.ActResponse(welcome=pb.Welcome(protocol_version=1, run_id="other"))
    async with acting(inference) as actor:
        with pytest.raises(Refused, match="serves run 'other', this actor belongs to 'default'"):
            await actor.ended()


async def test_the_end_of_one_stream_with_ok_is_the_end_of_the_actor(inference: ScriptedInference) -> None:
    inference.end_after = 7
    async with acting(inference, groups=2) as actor:
        await actor.ended(5)
        assert actor.stop.is_set()
    assert max(len(stream.steps) for stream in inference.streams) == 7


async def test_a_stream_that_is_rejected_again_and_again_comes_back_ever_more_rarely_and_says_so_once(
    inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Impatient(group.Backoff):
        def seconds(self) -> float:
            waits.append(super().seconds())
            return 0.0

    monkeypatch.setattr(group, "Backoff", Impatient)
    inference.reject, inference.reject_from = (grpc.StatusCode.INVALID_ARGUMENT, "row 1 is nan"), 3
    with capture_logs() as logs:
        async with acting(inference):
            await eventually(lambda: len(waits) >= 12, timeout=30)
    assert all(len(stream.steps) == 4 for stream in inference.streams[:12])
    assert waits[0] <= 0.1
    assert min(waits[8:12]) > 12
    assert max(waits) <= group.REJECTED_SECONDS
    said = [event["event"] for event in logs if event.get("group") == 0]
    assert said == ["connected", "inference rejected a step; trying again", "connected"]


async def test_only_a_stream_that_lasted_makes_the_next_wait_short_again(
    inference: ScriptedInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "SETTLED_SECONDS", 0.0)
    waits: list[str] = []

    class Recorded(group.Backoff):
        def seconds(self) -> float:
            waits.append("wait")
            return 0.01

        def reset(self) -> None:
            waits.append("reset")

    monkeypatch.setattr(group, "Backoff", Recorded)
    inference.reject = (grpc.StatusCode.INVALID_ARGUMENT, "no")
    async with acting(inference):
        await eventually(lambda: len(inference.streams) >= 4)
        assert "reset" not in waits
        inference.reject = None
        await inference.steps(3)
        assert waits.count("reset") == 2  # of either kind of wait


async def test_waiting_for_actions_is_not_limited(inference: ScriptedInference) -> None:
    async with acting(inference, step_timeout=1.0) as actor:
        await inference.steps(2)
        inference.let_go.clear()
        began = asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > began + 2.2)
        assert not actor.task.done()
        inference.let_go.set()
        await inference.steps(len(inference.streams[0].steps) + 5)
    assert len(inference.streams) == 1


async def test_an_environment_that_hangs_ends_the_actor(inference: ScriptedInference) -> None:
    kwargs = {"seconds": 3.0}
    async with acting(inference, SLOW, env_kwargs=kwargs, step_timeout=0.3) as actor:
        with pytest.raises(EnvironmentHangs, match=r"did not finish a step in 0.3 s \(--step-timeout\)"):
            await actor.ended(5)


async def test_a_crashed_environment_is_counted_and_shows_as_is_first(
    inference: ScriptedInference, tmp_path: Path, free_port: int
) -> None:
    kwargs = {"trouble": "step", "at": 4, "marker": str(tmp_path / "made"), "lengths": (50,)}
    async with acting(inference, TROUBLE, env_kwargs=kwargs, http_port=free_port):
        stream = await inference.steps(10)
        assert await metric(free_port, "environment_restarts_total") == 1
        assert await metric(free_port, "reset_steps_total") == 1
        assert await metric(free_port, "episodes_total") == 0
        status = json.loads((await get(free_port, "/status"))[1])
        assert status["replaced_environments"] == 1
        assert status["last_crash"] == "Crash: told to crash in step"
    assert len(inference.streams) == 1
    is_first = stream.flags("is_first")
    assert is_first[1:10].sum() == 1
    assert is_first[4].sum() == 1
    assert (stream.rewards()[is_first] == 0).all()
    assert not stream.flags("terminated").any()


@pytest.mark.parametrize("trouble", ["step", "cancel"])
async def test_an_environment_that_always_crashes_ends_the_actor(
    inference: ScriptedInference, trouble: str
) -> None:
    async with acting(inference, TROUBLE, env_kwargs={"trouble": trouble, "at": 1}) as actor:
        with pytest.raises(EnvironmentCrashed, match=f"^environment {TROUBLE} crashed 10 times in a row"):
            await actor.ended()


async def test_an_environment_that_is_cancelled_while_it_is_made_is_named(
    inference: ScriptedInference,
) -> None:
    async with acting(inference, TROUBLE, env_kwargs={"trouble": "cancel_made"}) as actor:
        with pytest.raises(UnsupportedEnvironment, match=r"could not be made \(sync\): CancelledError"):
            await actor.ended()


async def test_an_actor_says_that_it_makes_environments(
    inference: ScriptedInference, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Event()

    class Slow(service.SteppedGroup):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            assert made.wait(20)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(service, "SteppedGroup", Slow)
    async with acting(inference, http_port=free_port):
        await eventually(lambda: _http(free_port))
        status = json.loads((await get(free_port, "/status"))[1])
        assert (status["making_environments"], status["last_crash"]) == (True, "")
        assert (await get(free_port, "/readyz"))[0] == 503
        made.set()
        await inference.steps(3)
        status = json.loads((await get(free_port, "/status"))[1])
        assert status["making_environments"] is False


async def test_an_actor_whose_environments_take_long_to_make_is_healthy_as_long_as_they_come(
    free_port: int,
) -> None:
    kwargs = {"seconds": 0.0, "making_seconds": 1.2}
    options = {"group_size": 4, "http_port": free_port, "watchdog_seconds": 3.0}
    async with scripted_inference() as inference, acting(inference, SLOW, env_kwargs=kwargs, **options):
        await eventually(lambda: _http(free_port))

        async def steps() -> bool:
            assert (await get(free_port, "/healthz"))[0] == 200
            return bool(inference.streams and inference.streams[0].steps)

        await eventually(steps, timeout=20)


async def test_an_environment_that_hangs_while_it_is_made_fails_the_health_check_and_is_named(
    free_port: int,
) -> None:
    options = {"env_kwargs": {"trouble": "made"}, "http_port": free_port, "watchdog_seconds": 1.0}
    with capture_logs() as logs:
        async with scripted_inference() as inference, acting(inference, TROUBLE, **options):
            await eventually(lambda: _http(free_port))

            async def is_ill() -> bool:
                status, text = await get(free_port, "/healthz")
                return status == 503 and "environments made no progress" in text

            await eventually(is_ill)
            (said,) = await eventually(lambda: [event for event in logs if event["event"] == "no progress"])
    stack = said["stack"].partition("thread step-0")[2]
    assert "actor_environments.py" in stack


async def test_a_mistake_in_the_environment_needs_no_inference() -> None:
    config = ActorConfig(env="CartPole-v99", inference_url="127.0.0.1:1")
    with pytest.raises(UnsupportedEnvironment, match="did you mean"):
        await Actor(config).ended()


async def test_metrics_and_status_say_what_happened(inference: ScriptedInference, free_port: int) -> None:
    async with acting(inference, groups=2, http_port=free_port):
        await eventually(lambda: len(inference.streams) == 2)
        for index in range(2):
            await inference.steps(30, stream=index)
        inference.let_go.clear()
        await eventually(lambda: _is_quiet(inference))
        steps, resets, episodes = [
            await metric(free_port, name) for name in ("steps_total", "reset_steps_total", "episodes_total")
        ]
        first = sum(int(stream.flags("is_first")[1:].sum()) for stream in inference.streams)
        rows = sum((len(stream.steps) - 1) * 3 for stream in inference.streams)
        assert (steps, resets, episodes) == (rows - first, first, first)
        assert await metric(free_port, "groups") == 2
        assert await metric(free_port, "groups_connected") == 2
        assert await metric(free_port, "step_seconds_count") == rows / 3
        waited = await metric(free_port, "action_wait_seconds_total")
        assert 0 < waited < await metric(free_port, "action_wait_seconds_total"), "it goes on"
        assert (await get(free_port, "/healthz"))[0] == 200
        status = (await get(free_port, "/status"))[1]
        assert f'"steps":{int(steps)}' in status.replace(" ", "")
        inference.let_go.set()


async def test_a_step_is_work_while_it_lasts(free_port: int) -> None:
    kwargs, work = {"seconds": 1.0}, 'activity_seconds_total{activity="work"}'
    options = {"env_kwargs": kwargs, "group_size": 3, "http_port": free_port}
    async with scripted_inference() as inference, acting(inference, SLOW, **options):
        await eventually(lambda: bool(inference.streams and inference.streams[0].steps))
        await eventually(lambda: _has_worked(free_port, work))
        assert await metric(free_port, "step_seconds_count") == 0


async def _has_worked(port: int, work: str) -> bool:
    return await metric(port, work) > 0.5


async def _is_quiet(inference: ScriptedInference) -> bool:
    before = inference.total_steps
    for _ in range(30):
        await asyncio.sleep(0.005)
        if inference.total_steps != before:
            return False
    return True


def test_seeds_differ_by_actor_and_group_and_are_the_same_again() -> None:
    def drawn(seed: int | None, actor_id: str, group: int) -> int:
        return int(group_seeds(seed, actor_id=actor_id, group=group).generate_state(1)[0])

    assert drawn(1, "a", 0) == drawn(1, "a", 0)
    assert len({drawn(1, "a", 0), drawn(1, "a", 1), drawn(1, "b", 0), drawn(2, "a", 0)}) == 4
    assert drawn(None, "a", 0) != drawn(None, "a", 0)


def test_every_end_of_its_own_has_an_exit_status() -> None:
    statuses = [
        error.exit_status for error in (UnsupportedEnvironment, Refused, EnvironmentCrashed, SeedrlError)
    ]
    assert statuses == [2, 4, 1, 1]
