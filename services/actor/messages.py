"""What an actor says and what it accepts as an answer; knows no connection."""

import numpy as np
from numpy.typing import NDArray

from services.actor.config import ActorConfig
from services.actor.stepping import Transition
from shared.errors import ProtocolError, Refused
from shared.specs import EnvironmentSpec
from shared.wire import inference_pb2 as pb
from shared.wire.hello import PROTOCOL_VERSION, to_proto_observation

_ROLES = {"train": pb.ROLE_TRAIN, "eval": pb.ROLE_EVAL}


def hello(
    config: ActorConfig,
    spec: EnvironmentSpec,
    *,
    stream_id: str,
    shared_memory: pb.SharedMemory | None = None,
) -> pb.ActRequest:
    """The first message of a stream; `shared_memory` is offered."""
    return pb.ActRequest(
        hello=pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            run_id=config.run_id,
            actor_id=config.actor_id,
            stream_id=stream_id,
            group_size=config.group_size,
            role=_ROLES[config.role],
            task=config.task,
            observation=to_proto_observation(spec),
            action=pb.DiscreteActionSpec(n=spec.num_actions),
            shared_memory=shared_memory,
        )
    )


def step(sequence: int, transition: Transition) -> pb.ActRequest:
    """What a step or reset led to; `sequence` counts from 0 in each stream."""
    request = pb.ActRequest()
    message = request.step  # filled in place: a Step of its own would be copied into the request
    message.sequence = sequence
    message.observation.extend(transition.observation)
    message.reward = transition.reward
    message.terminated = transition.terminated
    message.truncated = transition.truncated
    message.is_first = transition.is_first
    return request


def check_welcome(response: pb.ActResponse, *, run_id: str) -> None:
    """Raises ProtocolError when it is no Welcome, Refused when it is another run's or protocol's."""
    if not response.HasField("welcome"):
        raise ProtocolError(f"Hello was answered with {response.WhichOneof('message')}, not with a Welcome")
    welcome = response.welcome
    if welcome.protocol_version != PROTOCOL_VERSION:
        raise Refused(
            f"the inference service speaks protocol version {welcome.protocol_version}, "
            f"this actor {PROTOCOL_VERSION}"
        )
    if welcome.run_id != run_id:
        raise Refused(
            f"the inference service serves run {welcome.run_id!r}, this actor belongs to {run_id!r}"
        )


def actions(
    response: pb.ActResponse, *, sequence: int, group_size: int, num_actions: int
) -> NDArray[np.int64]:
    """The [B] actions in an answer to Step `sequence`.

    Raises ProtocolError when it is none. The range is checked because ale-py's vector environment waits for
    ever after an action that it does not have.
    """
    if not response.HasField("actions"):
        raise ProtocolError(f"Step was answered with {response.WhichOneof('message')}, not with Actions")
    answer = response.actions
    if answer.sequence != sequence:
        raise ProtocolError(f"Step {sequence} was answered with the actions of Step {answer.sequence}")
    if len(answer.action) != 8 * group_size:
        raise ProtocolError(
            f"actions have {len(answer.action)} bytes; {group_size} environments need {8 * group_size}"
        )
    action: NDArray[np.int64] = np.frombuffer(answer.action, "<i8")
    if np.count_nonzero(action.view("<u8") >= num_actions):  # negative ones are the largest there
        raise ProtocolError(f"an action lies outside of 0 to {num_actions - 1}")
    return action
