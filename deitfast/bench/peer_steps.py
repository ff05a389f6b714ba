"""Others' steps, forward to update, and ours with a teacher in the loop."""

from contextlib import ExitStack
from typing import Any

import torch

from deitfast.bench.peer import SkipError, module
from deitfast.bench.stages import LEARNING_RATE, Targets, Workbench
from deitfast.bench.timing import Work
from deitfast.models.cnn import build_convnet
from deitfast.train.optim import build_optimizer
from pipelines.augment.chain import AugmentedBatch

TIMM_NAMES = {"ti": "tiny", "s": "small", "b": "base"}
TEACHERS = {"cuda": "regnet_y_16gf"}
"""The paper's teacher on a GPU; a smaller one elsewhere, where its forward pass would take minutes."""
SMALLER_TEACHER = "regnet_y_4gf"


def timm_step(bench: Workbench, stack: ExitStack) -> Work:
    """Open timm's network of the same shape, trained as its script trains: autocast, torch.compile, fused AdamW."""
    recipe, runtime = bench.recipe, bench.runtime
    family, _, size = recipe.model.arch.partition("_")
    if family not in ("deit", "vit"):
        raise SkipError(f"timm's {recipe.model.arch} is torchvision's network again")
    timm = module("timm")
    distilled = "_distilled" if recipe.distilled else ""
    name = f"deit_{TIMM_NAMES[size]}{distilled}_patch16_224"
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
    inputs = bench.prepared(bench.held)
    targets = torch.nn.functional.one_hot(inputs.labels, classes).float()

    def step() -> None:
        with runtime.autocast():
            heads = model(inputs.pixels)
            losses = [loss(head.float(), targets) for head in (heads if distilled else (heads,))]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    how = "compiled" if runtime.compile else "not compiled"
    return Work("", f"{name}, {how}", None, len(inputs.labels), step, on_device=True)


def teacher_in_the_loop(bench: Workbench, stack: ExitStack) -> Work:
    """Open our step with a teacher that looks at every batch: the recipe's own, or one with random weights."""
    inputs, learner = bench.prepared(bench.held), bench.learner
    own = bench.targets if bench.targets and bench.targets.looks else None
    targets = own or random_teacher(bench)
    known = bench.targets.find(inputs) if bench.targets else None

    def step() -> None:
        found = targets.find(inputs)
        learner.step(inputs, found if own else known, LEARNING_RATE, 0)

    return Work("", f"{targets.what}, then our step", None, len(inputs.labels), step, on_device=True)


def random_teacher(bench: Workbench) -> Targets:
    """Return a teacher that costs what a trained one costs; what it says is of no use."""
    runtime, size, classes = bench.runtime, bench.recipe.augment.size, len(bench.dataset.spec.classes)
    arch = TEACHERS.get(runtime.device.type, SMALLER_TEACHER)
    teacher: Any = build_convnet(arch, size=size, classes=classes).eval().to(runtime.device)
    teacher = teacher.to(memory_format=torch.channels_last)
    if runtime.compile:
        teacher.compile()

    def find(inputs: AugmentedBatch) -> torch.Tensor:
        with torch.no_grad(), runtime.autocast():
            return teacher(inputs.pixels)[0].argmax(-1)

    return Targets("teacher", f"{arch}, random weights", find)
