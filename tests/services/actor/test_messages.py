import numpy as np
import pytest

from services.actor import messages
from services.actor.config import ActorConfig
from services.actor.stepping import Transition
from shared.errors import ProtocolError, Refused
from shared.specs import EnvironmentSpec, LeafSpec
from shared.wire import inference_pb2 as pb
from shared.wire.hello import environment_from_hello

SPEC = EnvironmentSpec(
    observation=(LeafSpec(name="observation", dtype="float32", shape=(2,), low=(0.0,), high=(1.0,)),),
    num_actions=3,
)


def answered(sequence: int = 5, action: bytes | None = None) -> pb.ActResponse:
    data = np.array([0, 2], "<i8").tobytes() if action is None else action
    return pb.ActResponse(actions=pb.Actions(sequence=sequence, action=data))


def actions(response: pb.ActResponse) -> list[int]:
    return messages.actions(response, sequence=5, group_size=2, num_actions=3).tolist()


def test_hello_says_everything_that_inference_checks() -> None:
    config = ActorConfig(env="my.module:My-v0", run_id="r1", actor_id="a1", group_size=2, role="eval")
    hello = messages.hello(config, SPEC, stream_id="s1").hello
    assert environment_from_hello(hello) == SPEC
    assert (hello.run_id, hello.actor_id, hello.stream_id, hello.group_size) == ("r1", "a1", "s1", 2)
    assert (hello.role, hello.task, hello.protocol_version) == (pb.ROLE_EVAL, "My-v0", 1)


def test_a_step_holds_a_transition() -> None:
    transition = Transition([b"ab", b"c"], b"r", b"t", b"u", b"f", 1, 2, 3, 4)
    assert messages.step(7, transition).step == pb.Step(
        sequence=7, observation=[b"ab", b"c"], reward=b"r", terminated=b"t", truncated=b"u", is_first=b"f"
    )


def test_a_welcome_of_this_run_is_accepted() -> None:
    messages.check_welcome(pb.ActResponse(welcome=pb.Welcome(protocol_version=1, run_id="r1")), run_id="r1")


def test_another_runs_or_protocols_welcome_is_refused() -> None:
    with pytest.raises(Refused, match="serves run 'r2', this actor belongs to 'r1'"):
        messages.check_welcome(
            pb.ActResponse(welcome=pb.Welcome(protocol_version=1, run_id="r2")), run_id="r1"
        )
    with pytest.raises(Refused, match="speaks protocol version 2, this actor 1"):
        messages.check_welcome(
            pb.ActResponse(welcome=pb.Welcome(protocol_version=2, run_id="r1")), run_id="r1"
        )


def test_actions_instead_of_a_welcome_break_the_protocol() -> None:
    with pytest.raises(ProtocolError, match="Hello was answered with actions"):
        messages.check_welcome(answered(), run_id="r1")


def test_actions_are_read_as_they_were_sent() -> None:
    assert actions(answered()) == [0, 2]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (pb.ActResponse(welcome=pb.Welcome()), "Step was answered with welcome"),
        (pb.ActResponse(), "Step was answered with None"),
        (answered(sequence=4), "Step 5 was answered with the actions of Step 4"),
        (answered(action=b"\0" * 8), "8 bytes; 2 environments need 16"),
        (answered(action=b"\0" * 17), "17 bytes"),
        (answered(action=np.array([0, 3], "<i8").tobytes()), "outside of 0 to 2"),
        (answered(action=np.array([-1, 0], "<i8").tobytes()), "outside of 0 to 2"),
    ],
)
def test_an_answer_that_does_not_fit_breaks_the_protocol(response: pb.ActResponse, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        actions(response)
