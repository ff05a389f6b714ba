"""What each of the others' loaders and steps is to the bench."""

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from deitfast.bench.stages import Workbench
from deitfast.bench.timing import Work


class SkipError(Exception):
    """Why a peer was not measured."""


Opener = Callable[[Workbench, ExitStack], Work]
"""Opens a peer under a stack that closes it, or raises `SkipError` with the reason."""


def module(name: str) -> Any:
    """Import a peer's module, of whose types nothing is asked."""
    return import_module(name)
