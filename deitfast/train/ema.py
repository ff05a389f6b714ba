"""Averaged weights, evaluated beside the plain ones."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a model's parameters and buffers (timm's `ModelEmaV2`: average = d a + (1 - d) w).

    One departure: the decay of update t (from 0) is min(d, (1 + t) / (10 + t)). With d = .99996 a run of a few epochs
    would otherwise evaluate little more than its initialization. The two differ for the first 225,000 updates; a
    published run has 375,000, at whose end a weight from before counts e^-6 of what it did.

    Args:
        model: what is averaged, before it is compiled or wrapped; the average lives on its device and starts as a copy.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = deepcopy(model).eval()
        """The averaged model: evaluate this. It trains by no gradient, but its parameters look like the model's own, so
        that both share one compiled evaluation."""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average toward the model's weights; counters (integer buffers) are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        (averages, counters), (weights, counts) = _split(self.model), _split(model)
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        if counters:
            torch._foreach_copy_(counters, counts)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averaged model's own state."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Floating-point tensors and counters, each in an order that compiling and wrapping do not change."""
    tensors = [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
