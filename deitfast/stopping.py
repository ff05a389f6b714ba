"""Ending a run when asked to: SIGINT (Ctrl-C) and SIGTERM become a request, answered between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from deitfast.runtime import Runtime


class Stop:
    """Whether somebody asked the run to end."""

    signal: int = 0
    """Number of the signal that asked; 0: nobody did."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; a second one ends the process at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, runtime: Runtime, *, looking: bool) -> bool:
        """Return whether to stop here, the same on every rank.

        Several ranks agree only where `looking` is true: where they wait for each other anyway.
        """
        if runtime.world == 1:
            return bool(self.signal)
        if not looking:
            return False
        asked = torch.tensor([float(self.signal)], device=runtime.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


@contextmanager
def catching_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request to stop while the block runs."""
    stop = Stop()
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
