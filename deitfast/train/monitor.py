"""Watches a run about once a second, without its host ever waiting for the device or, in a step, for another rank."""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deitfast.runtime import Runtime
from deitfast.train.losses import PARTS
from deitfast.train.state import TrainState

LOOK_SECONDS = 1.0
"""Time between two looks."""
MOST_STEPS = 10_000
"""Steps between two looks, at most."""
MOST_STEPS_OF_AN_EPOCH = 1 << 32
"""Epoch and step as one number, which is exact in float64."""


@dataclass(frozen=True)
class Observation:
    """What a look has found, the same on every rank but for `means`."""

    means: dict[str, float] | None
    """Mean of every part of this rank's loss over the epoch, as of an earlier look; None: not known yet."""
    finite_at: tuple[int, int] | None
    """Epoch, and its steps, up to which the loss is known to be finite on every rank; None: not known yet."""
    diverged: bool
    """Whether any rank's loss is not finite."""
    signal: int
    """Number of the signal that any rank received; 0: none."""
    save: bool
    """Whether a checkpoint is due."""


class StepMonitor:
    """Looks at the loss sums, and has all ranks agree on what to do about it at the same step.

    A look starts to copy the sums to page-locked memory and reads what the look before has copied. Where there are
    several ranks, it also begins a reduction on the control group and takes the result of the one begun a look before,
    a second ago: by then every rank has taken part. The steps between two looks follow from the slowest rank's pace in
    that result, so that all ranks look at the same steps.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        pinned = runtime.device.type == "cuda"
        self._host = torch.zeros(len(PARTS), pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        self._copy_of: tuple[int, int] | None = None  # epoch and steps whose sums `_host` holds, or will
        self._means: dict[str, float] | None = None
        self._read_at: tuple[int, int] | None = None  # epoch and steps of the sums that were read last
        self._interval, self._since, self._looked = 1, 0, time.monotonic()
        self._votes: tuple[dist.Work | None, torch.Tensor] | None = None

    def after_step(self, state: TrainState, signal: int, save_due: bool) -> Observation | None:
        """Return what a look has found, if it is time for one. Every rank must call it after each of its steps.

        Args:
            state: after the step.
            signal: number of the signal that this rank received; 0: none.
            save_due: whether this rank's clock says that it is time for a checkpoint.
        """
        self._since += 1
        if self._since < self._interval and not (self._runtime.world == 1 and save_due):
            return None
        now = time.monotonic()
        pace, self._looked, self._since = (now - self._looked) / self._since, now, 0
        if self._copied:  # what this look copies is read at the next one
            self._read(state)
            self._copy(state)
        else:
            self._copy(state)
            self._read(state)
        diverged = self._means is not None and not all(map(math.isfinite, self._means.values()))
        epoch, steps = self._read_at or (-1, 0)
        # the ranks' largest of each; of the places that they have read, which may differ, the earliest
        votes = [float(diverged), float(signal), float(save_due), pace, -float(epoch * MOST_STEPS_OF_AN_EPOCH + steps)]
        found = votes if self._runtime.world == 1 else self._agreed(votes)
        if found is None:
            return None
        self._interval = min(max(1, round(LOOK_SECONDS / max(found[3], 1e-9))), MOST_STEPS)
        place = divmod(round(-found[4]), MOST_STEPS_OF_AN_EPOCH)
        finite_at = None if found[0] or place[0] < 0 else place
        return Observation(self._means, finite_at, bool(found[0]), int(found[1]), bool(found[2]))

    def reset(self) -> None:
        """Forget what is under way, before the run goes back to a checkpoint. Every rank must call it."""
        if self._votes and self._votes[0]:
            self._votes[0].wait()
        self._votes = self._copy_of = self._means = self._read_at = None
        self._interval, self._since, self._looked = 1, 0, time.monotonic()

    def close(self) -> None:
        """Drop a reduction that is under way, at a moment when other ranks may be gone."""
        self._votes = None

    def _copy(self, state: TrainState) -> None:
        """Start copying the sums, unless the device has not done the copy before."""
        if self._copy_of is None:
            self._host.copy_(state.losses, non_blocking=True)
            self._copy_of = state.epoch, state.steps
            if self._copied:
                self._copied.record()

    def _read(self, state: TrainState) -> None:
        """Take what was copied, if the device got that far; of an epoch that is over, nothing is taken."""
        if self._copy_of is None or (self._copied and not self._copied.query()):
            return
        self._read_at, self._copy_of = self._copy_of, None
        epoch, steps = self._read_at
        values = self._host.tolist()
        if epoch == state.epoch or not all(map(math.isfinite, values)):
            self._means = {name: value / max(steps, 1) for name, value in zip(PARTS, values, strict=True)}
        else:
            self._means = None

    def _agreed(self, votes: list[float]) -> list[float] | None:
        """Give this look's votes, and return the largest of all ranks' of the look before; None at the first."""
        result = None
        if self._votes:
            work, tensor = self._votes
            if work:
                work.wait()
            result = tensor.tolist()
        tensor = torch.tensor(votes, dtype=torch.float64)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._runtime.control, async_op=True)
        self._votes = work, tensor
        return result
