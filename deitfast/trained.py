"""A trained model, read back from its run's folder: for evaluation, and as a teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deitfast import checkpoint
from deitfast.model import build_model
from deitfast.recipe import Recipe
from deitfast.runlog import RunFolder, RunInfo


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with what is needed to use it."""

    model: nn.Module
    recipe: Recipe
    info: RunInfo
    epoch: int
    """Epoch, from 1, in which its weights were saved."""


def load_run(folder: Path, device: torch.device, *, ema: bool = False) -> TrainedModel:
    """Return the model of a run as its last checkpoint has it.

    Args:
        folder: a run's folder.
        device: where the model goes.
        ema: take the averaged weights.

    Raises:
        Mistake: no run or no checkpoint there, or no averaged weights in it.
        Failure: the checkpoint is damaged.
    """
    run = RunFolder(folder)
    recipe, info = run.recipe(), run.info()
    state = checkpoint.load(run.checkpoint, device)
    model = build_model(
        recipe.model, size=recipe.augment.size, classes=len(info.classes), distilled=recipe.distilled
    ).to(device)
    checkpoint.restore_model(model, state, run.checkpoint, ema=ema)
    model.eval().requires_grad_(False)
    return TrainedModel(model, recipe, info, state["epoch"] + 1)
