"""Other projects' loaders and steps, and ours with a teacher run on every batch, to be measured next to ours."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from deitfast.bench.baseline_loaders import SkipError, dali_stock, ffcv_stock, module, timm_dataloader
from deitfast.bench.stages import LEARNING_RATE
from deitfast.bench.timing import BenchCase
from deitfast.bench.workbench import Workbench
from deitfast.distill.targets import OnlineTeacher
from deitfast.models.cnn import build_convnet
from deitfast.train.optim import build_optimizer
from deitfast.weights.export import TIMM_SIZES

TEACHERS = {"cuda": "regnet_y_16gf", "cpu": "regnet_y_4gf"}
"""The paper's teacher on a GPU; a smaller one on a CPU, where its forward pass would take minutes."""


@dataclass(frozen=True)
class Opener:
    """How to open a baseline, and the distribution that it comes from."""

    distribution: str
    """The start of its name: DALI's ends in the version of CUDA."""
    open: Callable[[Workbench, ExitStack], BenchCase]
    """Opens it under a stack that closes it; raises `SkipError` with the reason why it cannot be measured here."""


def timm_step(bench: Workbench, stack: ExitStack) -> BenchCase:
    """Open timm's network of the same shape, trained as its script trains: autocast, torch.compile, fused AdamW."""
    recipe, runtime = bench.recipe, bench.runtime
    family, _, size = recipe.model.arch.partition("_")
    if family not in ("deit", "vit"):
        raise SkipError(f"timm's {recipe.model.arch} is torchvision's network again")
    timm = module("timm")
    distilled = "_distilled" if recipe.distilled else ""
    name = f"deit_{TIMM_SIZES[size]}{distilled}_patch16_224"
    classes = len(bench.dataset.spec.classes)
    model = timm.create_model(
        name,
        img_size=recipe.augment.size,
        patch_size=recipe.model.patch,
        num_classes=classes,
        drop_path_rate=recipe.model.drop_path,
    ).to(runtime.device, memory_format=torch.channels_last)
    if distilled:
        model.set_distilled_training(True)
    optimizer = build_optimizer(model, recipe.optim, recipe.train.batch)
    loss = module("timm.loss").SoftTargetCrossEntropy()
    if runtime.compile:
        model.compile()
    inputs = bench.augmented_to(bench.batch)
    targets = torch.nn.functional.one_hot(inputs.labels, classes).float()

    def step() -> None:
        with runtime.autocast():
            heads = model(inputs.pixels)
            losses = [loss(head.float(), targets) for head in (heads if distilled else (heads,))]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    how = "compiled" if runtime.compile else "not compiled"
    return BenchCase("", f"{name}, {how}", None, len(inputs.labels), step, on_device=True)


def online_teacher(bench: Workbench, stack: ExitStack) -> BenchCase:
    """Open our step with a teacher run on every batch: the recipe's own, or one with random weights."""
    train_step, targets = bench.student.train_step, bench.student.targets
    inputs = train_step.prepare(bench.augmented_to(bench.batch), 0)
    own = targets if targets and targets.needs_teacher else None
    teacher, what = (own, bench.recipe.distill.teacher) if own else random_teacher(bench)
    known = targets.get(inputs) if targets else None

    def step() -> None:
        found = teacher.get(inputs)
        train_step.step(inputs, found if own else known, LEARNING_RATE)

    return BenchCase("", f"{what}, then our step", None, len(inputs.labels), step, on_device=True)


class RandomTeacher:
    """A teacher of random weights, which takes the time of a trained one; its predictions are of no use."""

    def __init__(self, bench: Workbench) -> None:
        self._runtime, classes = bench.runtime, len(bench.dataset.spec.classes)
        self.arch = TEACHERS[bench.runtime.device.type]
        model = build_convnet(self.arch, size=bench.recipe.augment.size, classes=classes).eval()
        self._model: Any = model.to(bench.runtime.device).to(memory_format=torch.channels_last)  # pyright: ignore
        if bench.runtime.compile:
            self._model.compile()

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits, [B, C], of a batch as the student sees it."""
        with self._runtime.autocast():
            return self._model(pixels)[0]


def random_teacher(bench: Workbench) -> tuple[OnlineTeacher, str]:
    """Return such a teacher as a source of targets, and what it is in words."""
    teacher: Any = RandomTeacher(bench)
    return OnlineTeacher(teacher, bench.recipe), f"{teacher.arch} with random weights"


DATALOADER = "DataLoader, PIL, timm's DeiT transform"
LOADERS = {
    DATALOADER: Opener("timm", timm_dataloader),
    "FFCV's stock pipeline": Opener("ffcv", ffcv_stock),
    "DALI's stock pipeline": Opener("nvidia-dali", dali_stock),
}
STEPS = {
    "timm's step": Opener("timm", timm_step),
    "with a teacher run on every batch": Opener("torchvision", online_teacher),
}
