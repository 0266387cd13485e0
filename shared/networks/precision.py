"""Which device a network computes on, and in which precision."""

import functools
import re
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from shared.errors import ConfigurationError

Precision = Literal["auto", "float32", "bfloat16"]

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86 and, the last, ARM


def resolve_device(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto`: cuda where there is one.

    Raises ConfigurationError for another name or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigurationError(f"device {name!r} is none of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def autocast(precision: Precision, device: torch.device, network: nn.Module) -> torch.autocast:
    """The context in which `network` computes; it can be entered again and again, by one thread.

    It is off unless the network `uses_bfloat16`. While it is held, copies of the weights are kept: leave it
    before they change.
    """
    wanted = uses_bfloat16(precision, device, network)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def uses_bfloat16(precision: Precision, device: torch.device, network: nn.Module) -> bool:
    """Whether `network` computes in bfloat16; logits and baseline are float32 in any case.

    With `auto` networks with convolutions do where the device has the instructions.
    """
    if precision == "auto":
        return has_convolutions(network) and has_bfloat16(device)
    return precision == "bfloat16"


def has_convolutions(network: nn.Module) -> bool:
    """Whether any module of `network` is a convolution."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) for module in network.modules())


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bfloat16()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    try:
        text = _CPU_INFO.read_text()
    except OSError:
        return False
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return any(_CPU_FLAGS & set(line.split()) for line in lines)
