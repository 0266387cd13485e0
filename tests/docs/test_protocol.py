"""What docs/protocol.md shows is true: its bytes, its limits and its actor."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import gymnasium
import numpy as np
import pytest

from services.inference.session import StepReader, read_hello
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION, environment_from_hello
from shared.wire.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from shared.wire.limits import DTYPES, MAX_GROUP_SIZE, MAX_LEAVES, MAX_MESSAGE_BYTES, MAX_VALUES, MIB

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()


def block(label: str) -> str:
    """The text of the code block with this label."""
    found = re.search(rf"^```{label}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, label
    return found[1]


def example(label: str) -> bytes:
    """The bytes that a block of the worked example shows, without its remarks."""
    shown = [re.split(r"\s{2,}", line.strip())[0] for line in block(f"hex {label}").splitlines()]
    return bytes.fromhex(" ".join(shown))


def test_the_hello_of_the_example_is_valid_and_says_what_stands_beside_it() -> None:
    hello = pb.ActRequest.FromString(example("hello")).hello
    environment = environment_from_hello(hello)
    assert (hello.run_id, hello.actor_id, hello.stream_id, hello.task) == ("run", "a1", "s1", "Toy")
    assert (hello.group_size, hello.role, environment.num_actions) == (2, pb.ROLE_TRAIN, 3)
    assert str(environment.observation[0]) == "observation: float32[2] [-1, 1]"


def test_the_step_of_the_example_is_accepted_and_says_what_stands_beside_it() -> None:
    introduction = read_hello(example("hello"), run_id="run")
    request = pb.ActRequest.FromString(example("step"))
    assert request.step.sequence == 3
    request.step.sequence = 0
    request.step.is_first = b"\1\1"
    request.step.terminated, ended = b"\0\0", request.step.terminated
    step = StepReader(introduction.environment, group_size=2).read(request.SerializeToString())
    assert step.observation["observation"].tolist() == [[0.5, -1.0], [0.0, 0.25]]
    assert step.reward.tolist() == [1.0, -0.5]
    assert ended == b"\0\1"


def test_the_answers_of_the_example_say_what_stands_beside_them() -> None:
    welcome = pb.ActResponse.FromString(example("welcome")).welcome
    assert (welcome.protocol_version, welcome.run_id) == (PROTOCOL_VERSION, "run")
    actions = pb.ActResponse.FromString(example("actions")).actions
    assert np.frombuffer(actions.action, "<i8").tolist() == [2, 0]
    assert (actions.sequence, actions.weights_version) == (3, 41)


@pytest.mark.parametrize("label", ["hello", "welcome", "step", "actions"])
def test_the_bytes_of_the_example_are_what_protobuf_writes(label: str) -> None:
    message = pb.ActRequest if label in ("hello", "step") else pb.ActResponse
    assert message.FromString(example(label)).SerializeToString() == example(label)


def test_the_limits_are_those_of_the_code() -> None:
    assert f"The actor protocol, version {PROTOCOL_VERSION}\n" in DOCUMENT
    assert f"1 to {MAX_GROUP_SIZE:,}, and" in DOCUMENT
    assert f"1 to {MAX_VALUES:,}; they" in DOCUMENT
    assert f"1 to {MAX_LEAVES}; the order" in DOCUMENT
    assert f"at most {MAX_MESSAGE_BYTES // MIB} MiB of arrays" in DOCUMENT
    shown = re.search(r"^\| `dtype` \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert shown is not None
    named = [name for word in re.findall(r"`(.*?)`", shown[1]) for name in spelled_out(word)]
    assert sorted(named) == sorted(DTYPES)


def spelled_out(word: str) -> Iterator[str]:
    """`int8/16` as int8 and int16."""
    first, *sizes = word.split("/")
    yield first
    yield from (first.rstrip("0123456789") + size for size in sizes)


class Script(InferenceServicer):
    """Ends stream after stream as a script says, and checks every message as the service does."""

    def __init__(self, *endings: tuple[int, grpc.StatusCode]) -> None:
        self.endings = list(endings)  # after so many Steps, or -1: before the Welcome; with this status
        self.stream_ids: list[str] = []
        self.reset_steps = 0

    def Act(self, request_iterator: Iterator[pb.ActRequest], context: Any) -> Iterator[pb.ActResponse]:  # noqa: N802
        steps, status = self.endings.pop(0) if self.endings else (0, grpc.StatusCode.OK)
        introduction = read_hello(next(request_iterator).SerializeToString(), run_id="run")
        self.stream_ids.append(introduction.stream_id)
        if steps >= 0:
            yield pb.ActResponse(welcome=pb.Welcome(protocol_version=1, run_id="run"))
            yield from self._answers(request_iterator, introduction, steps)
        if status is not grpc.StatusCode.OK:
            context.abort(status, "as the script says")

    def _answers(self, requests: Iterator[pb.ActRequest], hello: Any, steps: int) -> Iterator[pb.ActResponse]:
        reader, ended = StepReader(hello.environment, group_size=2), np.ones(2, bool)
        for sequence in range(steps):
            step = reader.read(next(requests).SerializeToString())
            assert step.is_first.tolist() == ended.tolist()
            ended = step.terminated | step.truncated
            self.reset_steps += int(step.is_first.sum())
            action = np.full(2, sequence % 2, "<i8").tobytes()
            yield pb.ActResponse(actions=pb.Actions(sequence=sequence, action=action, weights_version=1))


def run_documented_actor(script: Script) -> None:
    source: dict[str, Any] = {}
    exec(block("python actor"), source)
    group = source["Group"]([gymnasium.make("CartPole-v1") for _ in range(2)], size=4, n=2)
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        add_InferenceServicer_to_server(script, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            source["run"](f"127.0.0.1:{port}", "run", group)
        finally:
            server.stop(0).wait()


def test_the_documented_actor_plays_until_the_run_is_over() -> None:
    status = grpc.StatusCode
    script = Script(
        (-1, status.UNAVAILABLE),
        (30, status.UNAVAILABLE),
        (3, status.INVALID_ARGUMENT),
        (-1, status.RESOURCE_EXHAUSTED),
        (200, status.OK),
    )
    run_documented_actor(script)
    assert script.endings == []
    assert len(set(script.stream_ids)) == 5
    assert script.reset_steps > 10  # episodes ended and began again


def test_the_documented_actor_gives_up_when_it_is_refused() -> None:
    with pytest.raises(SystemExit, match="refused: as the script says"):
        run_documented_actor(Script((-1, grpc.StatusCode.INVALID_ARGUMENT)))
