"""How far a run is: what a checkpoint holds besides what was learned."""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deitfast.train.losses import PARTS


class DivergedError(Exception):
    """The loss was not finite."""

    def __init__(self, epoch: int, steps: int) -> None:
        self.epoch, self.steps = epoch, steps
        super().__init__(f"epoch {epoch + 1}, step {steps}")


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
    """Views of those steps that went through this rank's teacher."""
    skipped: int = 0
    """Rows of them whose image could not be read."""

    @classmethod
    def start(cls, device: torch.device, epoch: int = 0) -> "TrainState":
        """Return the beginning of an epoch."""
        return cls(torch.zeros(len(PARTS), device=device), epoch)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint.

        Raises:
            DivergedError: the sums are not finite, so the weights may be past saving.
        """
        self.means()
        return {**asdict(self), "losses": self.losses.tolist()}

    @classmethod
    def restore(cls, state: dict[str, Any], device: torch.device) -> "TrainState":
        """Return the position that `state` was taken of."""
        names = ("epoch", "steps", "seconds", "waited", "teacher_views", "skipped")
        own = {name: state[name] for name in names if name in state}  # older checkpoints did not count the last two
        return cls(torch.tensor(state["losses"], device=device), **own)

    def sum_over_ranks(self, world: int) -> None:
        """Count what all `world` ranks did, at an epoch's end: the mean of their losses, all rows skipped."""
        if world == 1:
            return
        dist.all_reduce(self.losses)
        self.losses /= world
        skipped = torch.tensor(self.skipped, device=self.losses.device)
        dist.all_reduce(skipped)
        self.skipped = int(skipped)

    def means(self) -> dict[str, float]:
        """Return the mean of every part of the loss over the epoch so far. Waits for the device.

        Raises:
            DivergedError: one of them is not finite.
        """
        values = (self.losses / max(self.steps, 1)).tolist()
        if not all(map(math.isfinite, values)):
            raise DivergedError(self.epoch, self.steps)
        return dict(zip(PARTS, values, strict=True))

    def step_seed(self, seed: int, rank: int) -> int:
        """Return 63 bits for this step's stochastic depth and dropout: a function of where the run is."""
        key = f"{seed},{self.epoch},{self.steps},{rank}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
