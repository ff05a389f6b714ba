"""Where a run runs: device, precision, and the ranks of a distributed run. Decided once, at the start."""

from deitfast.runtime.device import choose_amp, choose_compile, choose_device
from deitfast.runtime.process import Runtime, start
from deitfast.runtime.ranks import RankFailedError

__all__ = ["RankFailedError", "Runtime", "choose_amp", "choose_compile", "choose_device", "start"]
