"""Small runs for tests of training: a recipe that takes seconds, and one way to run it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.progress import Display
from deitfast.report.live import LiveReport
from deitfast.runtime import Runtime
from deitfast.train import step as step_module
from deitfast.train.job import TrainJob
from deitfast.train.trainer import train

CPU = Runtime(torch.device("cpu"), rank=0, world=1, amp=None, compile=False)
EVERY_STEP = "train.checkpoint_minutes=0"
"""Setting of runs that crash and go on: a checkpoint after each step, which takes as long as the step."""
SOON = 30.0
"""Seconds in which a run must have ended; its own work here takes one or two, on a loaded machine ten."""


def tiny_recipe(*settings: str, base: str = "deit_ti_cifar10") -> Recipe:
    """Two epochs of five steps on 80 images of 32 px, all augmentation on; a transformer has two blocks, not twelve."""
    network = ["model.patch=16", "model.depth=2"] if base.startswith("deit") else []
    small = [
        "distill.cache=none",
        "train.epochs=2",
        "train.batch=16",
        "augment.mix_group=8",
    ]
    return recipes.override(recipes.load(base), recipes.parse_settings([*network, *small, *settings]))


def run(data: Path, out: Path, recipe: Recipe, *, resume: bool = False, report: bool = False) -> dict[str, Any]:
    """Train on the CPU, in this process; without the report, which takes twice as long as these steps."""
    job = TrainJob(recipe, data, out, resume, command=("test",))
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            patch.setattr(LiveReport, "write", lambda self, **options: None)
        return train(job, CPU, Display(Console(), quiet=True))


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's checkpoint, plain and averaged."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    averaged = state["ema"]["model"] if state["ema"] else {}
    return {**state["model"], **{f"average of {name}": value for name, value in averaged.items()}}


class CrashError(Exception):
    """The machine goes away."""


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Make the learner's step `steps` + 1 the last thing that happens."""
    original, done = step_module.TrainStep.step, []

    def crashing(self, *arguments):
        if len(done) == steps:
            raise CrashError
        done.append(None)
        return original(self, *arguments)

    monkeypatch.setattr(step_module.TrainStep, "step", crashing)
