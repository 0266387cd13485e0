"""From a run's spec to its network: the built-in ones by name, a user's own as `module:Class`."""

import importlib
import inspect
from typing import Any, cast

import torch
from torch import nn

from shared.errors import ConfigurationError
from shared.networks.calls import error_words
from shared.networks.contract import CheckedNetwork, check_network, random_input
from shared.networks.impala_deep import ImpalaDeepNetwork
from shared.networks.impala_shallow import ImpalaShallowNetwork
from shared.networks.interface import Network
from shared.networks.mlp import MlpNetwork
from shared.networks.nature import NatureNetwork
from shared.networks.pictures import resolved_network
from shared.networks.precision import Precision, has_convolutions
from shared.specs import Agent, RunSpec
from shared.working_directory import OWN_PACKAGES, see_working_directory

_NETWORKS: dict[str, type[Network]] = {
    "mlp": MlpNetwork,
    "nature": NatureNetwork,
    "impala_shallow": ImpalaShallowNetwork,
    "impala_deep": ImpalaDeepNetwork,
}

AVAILABLE: tuple[str, ...] = tuple(_NETWORKS)


def build_network(spec: RunSpec) -> Network:
    """The network of `spec` with fresh weights from torch's global generator, in float32 on the CPU.

    Raises ConfigurationError for an unknown name, module or class, for a class that is no network, for a
    network that cannot take the environment's observations, and for one whose states or outputs are not what
    the interface says: of another kind, number, shape or dtype, or not finite.
    """
    name = resolved_network(spec.network.name, spec.environment)
    network_class = _NETWORKS.get(name) or _imported(name)
    try:
        network = network_class(
            environment=spec.environment, network=spec.network, **_agent(network_class, spec)
        )
    except ConfigurationError:
        raise
    except Exception as error:
        if name in _NETWORKS:
            raise
        raise ConfigurationError(f"network {name} could not be built: {error_words(error)}") from error
    if name not in _NETWORKS:
        _check_output(name, network, spec)
    return cast(Network, network)


def _agent(network_class: type[Any], spec: RunSpec) -> dict[str, Agent]:
    """The agent, if the network names it, or the class that it hands its **keywords on to."""
    own = (vars(each) for each in network_class.__mro__)
    for constructor in (each["__init__"] for each in own if "__init__" in each):
        parameters = inspect.signature(constructor).parameters
        if "agent" in parameters:
            return {"agent": spec.agent}
        if inspect.Parameter.VAR_KEYWORD not in [each.kind for each in parameters.values()]:
            break
    return {}


def _check_output(name: str, network: nn.Module, spec: RunSpec) -> None:
    """Raises ConfigurationError when the network is made for another agent or environment than the run's."""
    generator = torch.Generator().manual_seed(0)
    inputs = random_input(spec.environment, spec.network, steps=2, batch=3, generator=generator)
    modes = [(module, module.training) for module in network.modules()]
    checked = CheckedNetwork(network, spec.environment.num_actions, spec.agent)
    try:
        with torch.no_grad():
            network.eval()
            checked(inputs, checked.initial_state(3))
    except AssertionError as error:
        raise ConfigurationError(f"network {name}: {error}") from error
    finally:
        for module, is_training in modes:
            module.training = is_training


def check_contract(spec: RunSpec, precision: Precision) -> None:
    """Tries a user's own network, with weights of its own, for all that docs/networks.md says it must keep.

    In float32 on the CPU, and in bfloat16 where with this `precision` some device computes in that; torch's
    global generator stays as it is. Raises ConfigurationError with the first point that is broken, and as
    `build_network` does. Networks that come with the project are not tried.
    """
    name = resolved_network(spec.network.name, spec.environment)
    if name in _NETWORKS:
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # so that it is refused always or never
        network = build_network(spec)
        bfloat16 = precision == "bfloat16" or (precision == "auto" and has_convolutions(network))
        try:
            check_network(network, spec.environment, spec.network, agent=spec.agent, bfloat16=bfloat16)
        except AssertionError as error:
            raise ConfigurationError(
                f"network {name} breaks its contract: {error}; see docs/networks.md"
            ) from error


def check_network_name(name: str) -> None:
    """Raises ConfigurationError for an unknown name, module or class, and for a class that is no network."""
    if name != "auto" and name not in _NETWORKS:
        _imported(name)


def _imported(name: str) -> type[Any]:
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise ConfigurationError(
            f"unknown network {name!r}; there are auto, {', '.join(AVAILABLE)}, or your own as module:Class"
        )
    see_working_directory()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigurationError(_import_failure(name, module_name, error)) from error
    network_class = getattr(module, class_name, None)
    if network_class is None:
        raise ConfigurationError(f"network {name}: module {module_name} has no {class_name}")
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ConfigurationError(f"network {name}: {class_name} is no torch.nn.Module class")
    if not callable(getattr(network_class, "initial_state", None)):
        raise ConfigurationError(f"network {name}: {class_name} has no initial_state(batch_size)")
    return network_class


def _import_failure(name: str, module_name: str, error: Exception) -> str:
    top = module_name.partition(".")[0]
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and f"{module_name}.".startswith(f"{error.name}.")
    ):
        taken = (
            f"; the name {top!r} belongs to seedrl itself: give your package another"
            if top in OWN_PACKAGES
            else ""
        )
        return f"network {name}: there is no module {error.name}{taken}"
    return f"network {name}: module {module_name} could not be imported: {error_words(error)}"
