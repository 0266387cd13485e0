"""What a network raises, in words, and with the name of the network where it is a user's own."""

from collections.abc import Callable
from typing import Any

from torch import nn

from shared.errors import SeedrlError
from shared.networks.interface import NetworkInput, State
from shared.working_directory import OWN_PACKAGES


def call_network(
    network: Callable[..., tuple[Any, State]], inputs: NetworkInput, state: State
) -> tuple[Any, State]:
    """`network(inputs, state)`. Where a user's own raises, it is a RuntimeError with the network's name and
    these words, and the network's own error as its cause.
    """
    try:
        return network(inputs, state)
    except Exception as error:
        if isinstance(error, SeedrlError) or not _is_own(network):
            raise
        kind = type(network)
        words = f"network {kind.__module__}:{kind.__qualname__}: {error_words(error)}"
        raise RuntimeError(words) from error


def error_words(error: BaseException) -> str:
    """Kind and text of `error` in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_own(network: object) -> bool:
    top = type(network).__module__.partition(".")[0]
    return isinstance(network, nn.Module) and top not in {*OWN_PACKAGES, "torch"}
