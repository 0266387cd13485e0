"""Modules of a user's own, which may lie in the working directory."""

import os
import sys

OWN_PACKAGES = frozenset({"services", "shared"})
"""Of seedrl itself, whose names no module of a user's can have."""


def see_working_directory() -> None:
    """Modules in it can be imported from now on; it comes last, so that they cannot shadow anything."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # somebody removed it
        return
    if here not in sys.path:
        sys.path.append(here)
