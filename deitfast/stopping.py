"""Ending a run when asked to: SIGINT (Ctrl-C) and SIGTERM become a request.

It is answered between two steps, where everything that was learned can be saved; and at once where a run waits or
does what can be done again: waiting for a batch, compiling, evaluating, writing its report.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from deitfast.runtime import Runtime


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to end, and it can be gone on from here."""


class Stop:
    """Whether somebody asked the run to end."""

    def __init__(self, runtime: Runtime) -> None:
        self.signal = 0
        """Number of the signal that asked; 0: nobody did."""
        self._runtime = runtime
        self._at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal, or end an `at_once` block; a second signal ends the process at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._at_once:
            raise Interrupted

    def check(self, *, looking: bool) -> None:
        """Raise Interrupted where somebody asked, on every rank alike.

        Several ranks agree only where `looking` is true: where they wait for each other anyway.
        """
        if self._runtime.world == 1:
            asked = bool(self.signal)
        elif looking:
            votes = torch.tensor([float(self.signal)], device=self._runtime.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            asked = bool(votes.item())
        else:
            return
        if asked:
            raise Interrupted

    @contextmanager
    def at_once(self, when: bool = True) -> Iterator[None]:
        """Let a request end the block in its middle, if `when`; of several ranks none may leave alone, so none does.

        Raises:
            Interrupted: asked to end, before or inside the block.
        """
        self._at_once = when and self._runtime.world == 1
        try:
            if self._at_once and self.signal:
                raise Interrupted
            yield
        finally:
            self._at_once = False


@contextmanager
def catching_signals(runtime: Runtime) -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request to stop while the block runs."""
    stop = Stop(runtime)
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
