"""How far a run is: what a checkpoint holds besides what was learned."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deitfast.runtime import Runtime
from deitfast.train.losses import PARTS


class DivergedError(Exception):
    """The loss, or a weight, is not finite."""

    def __init__(self, epoch: int, steps: int, what: str = "the loss") -> None:
        self.epoch, self.steps, self.what = epoch, steps, what
        super().__init__(f"{what} is not finite at epoch {epoch + 1}, step {steps}")


@dataclass
class TrainState:
    """Where a run stands, and the sums over the steps of its current epoch."""

    losses: Tensor
    """float32 [3], on the device: sums of `losses.PARTS`."""
    epoch: int = 0
    """Epochs that are finished."""
    steps: int = 0
    """Steps of the current epoch that are done."""
    seconds: float = 0.0
    """Wall time of those steps."""
    waited: float = 0.0
    """Part of it that they waited for data."""
    teacher_views: int = 0
    """Views of those steps that this rank's teacher was run on."""
    skipped: int = 0
    """Rows of them whose image could not be read."""

    @classmethod
    def start(cls, device: torch.device, epoch: int = 0) -> "TrainState":
        """Return the beginning of an epoch."""
        return cls(torch.zeros(len(PARTS), device=device), epoch)

    def over_ranks(self, runtime: Runtime) -> "TrainState":
        """Return the state of the whole run: the mean of all ranks' losses, the sums of what they count.

        Every rank must call it. Waits for the device.
        """
        if runtime.world == 1:
            return self
        *losses, skipped, views = runtime.sum_over_ranks([*self.losses.tolist(), self.skipped, self.teacher_views])
        mean = torch.tensor(losses, dtype=torch.float64) / runtime.world
        return replace(self, losses=mean.float(), skipped=int(skipped), teacher_views=int(views))

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint. Waits for the device."""
        return {**asdict(self), "losses": self.losses.tolist()}

    @classmethod
    def restore(cls, state: dict[str, Any], runtime: Runtime) -> "TrainState":
        """Return the state that `state` was taken of `over_ranks`: what is counted is rank 0's from here."""
        names = ("epoch", "steps", "seconds", "waited")
        counted = ("teacher_views", "skipped")
        own = {name: state[name] for name in names} | {n: state[n] if runtime.is_main_process else 0 for n in counted}
        return cls(torch.tensor(state["losses"], device=runtime.device), **own)

    def means(self) -> dict[str, float]:
        """Return the mean of every part of the loss over the epoch so far. Waits for the device.

        Raises:
            DivergedError: one of them is not finite.
        """
        values = (self.losses / max(self.steps, 1)).tolist()
        if not all(map(math.isfinite, values)):
            raise DivergedError(self.epoch, self.steps)
        return dict(zip(PARTS, values, strict=True))
