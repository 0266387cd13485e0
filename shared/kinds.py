"""Kinds of settings: numbers within bounds, names of devices, and marks of what a setting is for."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, Field

MAX_SIZE = 65_536
MAX_SLOTS = 2**24  # environments of one inference service
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
"""Of what is set aside in memory: units, steps, rows."""
Count = Annotated[int, Field(ge=1, lt=2**63)]
"""Of what passes by; it stands in JSON, whose integers end there."""
LONGEST_SECONDS = 1e9
"""Timers of threads take not much more."""
Threads = Annotated[int, Field(ge=1, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators and numpy's take, and JSON holds."""


def _checked_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_checked_device)]


class Heading(Enum):
    """What settings stand below in help, in this order.

    Marks a setting, or is the attribute `heading` of a class for those that it declares.
    """

    RUN = "Run"
    ENVIRONMENTS = "Environments and actors"
    NETWORK = "Network"
    TRAINING = "Training"
    VTRACE = "V-trace (--agent vtrace)"
    R2D2 = "R2D2 and replay (--agent r2d2)"
    OPTIMIZER = "Optimizer"
    DEVICES = "Devices and threads"
    INFERENCE = "Inference"
    ACCESS = "NATS, tokens and TLS"
    LOGGING = "Logging, HTTP and shutdown"


HEADINGS = {"vtrace": Heading.VTRACE, "r2d2": Heading.R2D2}
"""Of what is for one agent alone."""


@dataclass(frozen=True)
class Only:
    """Marks a setting that has a meaning for one agent alone."""

    agent: str


@dataclass(frozen=True)
class Unused:
    """Marks a setting that a command has no use for, but takes where one file or environment serves many.

    As an option of that command it is refused with `advice`.
    """

    advice: str


VTRACE = Only("vtrace")
R2D2 = Only("r2d2")
