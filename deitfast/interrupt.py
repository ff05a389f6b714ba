"""Ending a run when asked to: SIGINT (Ctrl-C), SIGTERM and SIGHUP (its terminal is gone) become a request.

It is answered between two steps, where everything that was learned can be saved; and at once where a run waits or
does what can be done again: waiting for a batch, compiling, evaluating, writing its report.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from deitfast.runtime import Runtime


class Interrupted(KeyboardInterrupt):
    """The run is to end, and can be resumed from here. Its text is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


class Stop:
    """Whether the run is to end."""

    def __init__(self, runtime: Runtime) -> None:
        self.signal = 0
        """Number of the signal that came; 0: none."""
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

    def check(self, *, sync: bool = False) -> None:
        """Raise Interrupted where a signal came: to this rank if it is alone, to any rank if all `sync` here."""
        alone = self._runtime.world == 1
        asked = self.signal if alone else int(self._runtime.max_over_ranks([self.signal])[0]) if sync else 0
        if asked:
            raise Interrupted(asked)

    @contextmanager
    def interruptible(self, when: bool = True) -> Iterator[None]:
        """Let a signal end the block in its middle, if `when`; of several ranks none may leave alone, so none does.

        Raises:
            Interrupted: a signal came, before or inside the block.
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
