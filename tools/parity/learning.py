"""Networks, losses and rates against timm's, and against the formulas where timm has none."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.data.mixup import mixup_target
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim._param_groups import param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor
from torch.nn import functional as F

from deitfast.config.choices import Arch
from deitfast.config.recipe import ModelSpec, OptimSpec, ScheduleSpec
from deitfast.models.vit import build_model, joint
from deitfast.train.losses import hard_distillation, mixed_cross_entropy, soft_distillation
from deitfast.train.optim import build_optimizer, learning_rate, peak_lr
from tools.parity.check import Check, compare

Loss = Callable[[Tensor], Tensor]
MODEL_ALLOWED = 1e-5
LOSS_ALLOWED = 1e-5
CLASSES, BATCH, TAU = 11, 8, 3.0
NETWORKS: tuple[tuple[Arch, str, int, int], ...] = (
    ("deit_ti", "deit_tiny_distilled_patch16_224", 224, 16),
    ("deit_s", "deit_small_distilled_patch16_224", 224, 16),
    ("deit_b", "deit_base_distilled_patch16_224", 224, 16),
    ("vit_ti", "deit_tiny_patch16_224", 224, 16),
    ("deit_ti", "deit_tiny_distilled_patch16_224", 384, 16),
    ("deit_ti", "deit_tiny_distilled_patch16_224", 32, 4),
)


def networks() -> Iterator[Check]:
    """Compare outputs of both heads and all gradients, with the same random weights, in float32."""
    for arch, name, size, patch in NETWORKS:
        ours, theirs = _pair(arch, name, size, patch)
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        heads, others = ours(pixels), theirs(pixels)
        others = others if isinstance(others, tuple) else (others,)
        for outputs in (heads, others):
            torch.stack([head.square().mean() for head in outputs]).sum().backward()
        expected = dict(theirs.named_parameters())
        gradients = [_relative(parameter.grad, expected[name].grad) for name, parameter in ours.named_parameters()]
        zeros = [torch.zeros_like(gradient) for gradient in gradients]
        what = f"{arch} {size}/{patch}"
        for head, one, other in zip(("class", "distillation"), heads, others, strict=False):
            yield compare(f"{what}, {head} head", one.detach(), other.detach(), MODEL_ALLOWED, unit=_scale(other))
        with torch.no_grad():
            one, other = joint(ours.eval()(pixels)), theirs.eval()(pixels)
        yield compare(f"{what}, evaluation", one, other, MODEL_ALLOWED, unit=_scale(other))
        yield compare(f"{what}, gradients", gradients, zeros, MODEL_ALLOWED)


def losses() -> Iterator[Check]:
    """Compare each loss's value and its gradient by the logits."""
    draw = torch.Generator().manual_seed(2)
    logits, teacher = torch.randn(2, BATCH, CLASSES, generator=draw) * 3
    labels = torch.randint(0, CLASSES, (BATCH,), generator=draw)
    for lam in (1.0, 0.3):
        mixed = {"mix_labels": labels.flip(0), "lam": torch.full((BATCH,), lam), "smoothing": 0.1}
        ours = partial(mixed_cross_entropy, labels=labels, **mixed)
        theirs = partial(SoftTargetCrossEntropy(), target=mixup_target(labels, CLASSES, lam=lam, smoothing=0.1))
        yield _both(f"smoothed, mixed cross-entropy, lam {lam:g}", ours, theirs, logits)
    guesses = teacher.argmax(1)
    ours = partial(hard_distillation, teacher_labels=guesses)
    yield _both("hard distillation", ours, lambda z: -z.log_softmax(1)[range(BATCH), guesses].mean(), logits)
    divisors: dict[Literal["batch", "batch_classes"], int] = {"batch": BATCH, "batch_classes": BATCH * CLASSES}
    for normalization, divisor in divisors.items():
        ours = partial(soft_distillation, teacher_logits=teacher, tau=TAU, normalization=normalization)
        theirs = partial(_divergence, teacher=teacher, divisor=divisor)
        yield _both(f"soft distillation, by {normalization}", ours, theirs, logits)


def rates() -> Iterator[Check]:
    """Compare the learning rate at every epoch, the groups of weight decay, and drop path by layer."""
    peak = peak_lr(OptimSpec(), 1024)
    for epochs in (300, 30):
        ours = [learning_rate(ScheduleSpec(per="epoch"), peak, epochs, 1251, epoch, 0) for epoch in range(epochs)]
        yield compare(f"learning rate, {epochs} epochs", ours, _reference_rates(epochs, peak), 1e-12, unit=peak)
    model: Any = build_model(ModelSpec(), size=224, classes=CLASSES, distilled=True)
    theirs: Any = timm.create_model(NETWORKS[0][1], num_classes=CLASSES, drop_path_rate=0.1)
    groups = build_optimizer(model, OptimSpec(), 1024).param_groups
    others = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay())
    ours, expected = ({group["weight_decay"]: _size(group["params"]) for group in some} for some in (groups, others))
    yield compare("weights decayed", [ours[0.05], ours[0.0]], [expected[0.05], expected[0.0]], 0)
    ours = [block.drop_path for block in model.blocks]
    yield compare("drop path by layer", ours, [_drop_probability(block) for block in theirs.blocks], 1e-7)


def _pair(arch: Arch, name: str, size: int, patch: int) -> tuple[Any, Any]:
    """Return our network and timm's with the same weights, none at its initial zeros and ones."""
    theirs: Any = timm.create_model(name, img_size=size, patch_size=patch, num_classes=CLASSES)
    draw = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=draw)
    distilled = arch.startswith("deit_")
    ours = build_model(ModelSpec(arch=arch, patch=patch, drop_path=0), size=size, classes=CLASSES, distilled=distilled)
    ours.load_state_dict(theirs.state_dict())
    if distilled:
        theirs.set_distilled_training(True)
    return ours.train(), theirs.train()


def _relative(gradient: Tensor | None, expected: Tensor | None) -> Tensor:
    """Return a gradient's error in multiples of the expected gradient's largest entry; NaN where there is none."""
    if gradient is None or expected is None:
        return torch.tensor([math.nan])
    return (gradient - expected) / _scale(expected)


def _scale(values: Tensor) -> float:
    return max(values.abs().max().item(), 1e-12)


def _both(name: str, ours: Loss, theirs: Loss, logits: Tensor) -> Check:
    """Compare a loss of the logits in value and gradient, theirs in float64."""
    one, other = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = ours(one), theirs(other)
    for value in values:
        value.backward()
    assert one.grad is not None
    assert other.grad is not None
    return compare(name, [values[0].detach(), one.grad], [values[1].detach(), other.grad], LOSS_ALLOWED)


def _divergence(logits: Tensor, teacher: Tensor, divisor: int) -> Tensor:
    """tau^2 KL(teacher || student) at temperature tau, written out."""
    p, q = (F.softmax(values.double() / TAU, dim=1) for values in (teacher, logits))
    return TAU**2 * (p * (p.log() - q.log())).sum() / divisor


def _reference_rates(epochs: int, peak: float) -> list[float]:
    """Return each epoch's rate as the DeiT reference has it: timm's scheduler, stepped after the epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return found


def _size(parameters: list[Tensor]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def _drop_probability(block: torch.nn.Module) -> float:
    return getattr(block.drop_path1, "drop_prob", 0.0) or 0.0
