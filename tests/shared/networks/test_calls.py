"""What a network raises while a run goes on names the network, and keeps what it was."""

import pytest
import torch
from torch import nn

from shared.errors import ConfigurationError
from shared.networks.calls import call_network
from shared.networks.interface import NetworkInput, State
from shared.networks.mlp import MlpNetwork
from shared.specs import EnvironmentSpec, LeafSpec, NetworkSpec

NOTHING = NetworkInput({}, *(torch.zeros(1, 1) for _ in range(3)))


class Fails(nn.Module):
    """Raises what it was given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, inputs: NetworkInput, state: State) -> None:
        raise self.error


def test_an_error_of_a_users_network_names_the_network_and_is_the_cause() -> None:
    error = ValueError("mask\nis all False")
    words = rf"^network {__name__}:Fails: ValueError: mask is all False$"
    with pytest.raises(RuntimeError, match=words) as raised:
        call_network(Fails(error), NOTHING, ())
    assert raised.value.__cause__ is error


def test_an_error_of_seedrl_itself_stays_what_it_is() -> None:
    error = ConfigurationError("another value")
    with pytest.raises(ConfigurationError) as raised:
        call_network(Fails(error), NOTHING, ())
    assert raised.value is error
    leaf = LeafSpec(name="x", dtype="float32", shape=(2,), low=(0.0,), high=(1.0,))
    environment = EnvironmentSpec(observation=(leaf,), num_actions=2)
    with pytest.raises(KeyError):
        call_network(MlpNetwork(environment=environment, network=NetworkSpec(name="mlp")), NOTHING, ())


def test_what_a_network_returns_is_passed_on() -> None:
    assert call_network(lambda inputs, state: (inputs, state), NOTHING, ()) == (NOTHING, ())
