"""Ending a run when asked to: SIGINT (Ctrl-C), SIGTERM and SIGHUP (its terminal is gone) become a request.

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
    """Somebody asked the run to end, and it can be gone on from here. Its text is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


class Stop:
    """Whether somebody asked the run to end."""

    def __init__(self, runtime: Runtime) -> None:
        self.signal = 0
        """Number of the signal that asked; 0: nobody did."""
        self._runtime = runtime
        self._raise_now = False

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal, or end an `interruptible` block; a second signal ends the process at once.

        Not if that is SIGHUP: a terminal and its shell both send one, and a logout sends SIGTERM as well.
        """
        if self.signal:
            if number == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        self.signal = number
        if self._raise_now:
            raise Interrupted(number)

    def check(self, *, sync: bool) -> None:
        """Raise Interrupted where somebody asked, on every rank alike.

        Several ranks agree only where `sync` is true: where they wait for each other anyway.
        """
        if self._runtime.world == 1:
            asked = self.signal
        elif sync:
            votes = torch.tensor([float(self.signal)], device=self._runtime.device)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            asked = int(votes.item())
        else:
            return
        if asked:
            raise Interrupted(asked)

    @contextmanager
    def interruptible(self, when: bool = True) -> Iterator[None]:
        """Let a request end the block in its middle, if `when`; of several ranks none may leave alone, so none does.

        Raises:
            Interrupted: asked to end, before or inside the block.
        """
        self._raise_now = when and self._runtime.world == 1
        try:
            if self._raise_now and self.signal:
                raise Interrupted(self.signal)
            yield
        finally:
            self._raise_now = False


@contextmanager
def catching_signals(runtime: Runtime) -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request to stop while the block runs."""
    stop = Stop(runtime)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored where a run is to outlive its terminal: nohup
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, stop.handle_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
