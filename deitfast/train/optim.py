"""The optimizer and its learning rate: what is decayed, what the batch makes of the rate, and how it changes."""

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from deitfast.config.recipe import OptimSpec, ScheduleSpec

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types for which torch has fused AdamW and SGD: one kernel for all parameters instead of several for each."""


def peak_lr(spec: OptimSpec, batch: int) -> float:
    """Return the peak learning rate for a global batch: `lr` scaled linearly from `lr_batch`, or as it is at 0."""
    return spec.lr * batch / spec.lr_batch if spec.lr_batch else spec.lr


def is_decayed(name: str, parameter: nn.Parameter, spec: OptimSpec) -> bool:
    """Whether weight decay applies: not to 1-D parameters, biases, positions and the class token.

    The distillation token is decayed by the DeiT reference and not by today's timm: `spec.decay_dist_token`.
    """
    match name.rpartition(".")[2]:
        case "bias" | "pos_embed" | "cls_token":
            return False
        case "dist_token":
            return spec.decay_dist_token
    return parameter.ndim > 1


def build_optimizer(model: nn.Module, spec: OptimSpec, batch: int) -> Optimizer:
    """Return AdamW, or SGD with Nesterov momentum, over the model's trainable parameters where they are now.

    Two groups, the decayed parameters first, both at the peak learning rate for a global `batch`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if is_decayed(name, parameter, spec)]
    others = [parameter for name, parameter in named if not is_decayed(name, parameter, spec)]
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    lr = peak_lr(spec, batch)
    fused = all(parameter.device.type in FUSED_DEVICES for _, parameter in named)
    match spec.name:
        case "adamw":
            return AdamW(groups, lr=lr, betas=spec.betas, eps=spec.eps, fused=fused)
        case "sgd":
            return SGD(groups, lr=lr, momentum=spec.momentum, nesterov=spec.momentum > 0, fused=fused)


def learning_rate(
    schedule: ScheduleSpec, peak: float, epochs: int, steps_per_epoch: int, epoch: int, step: int
) -> float:
    """Return the learning rate of one step: linear warm-up, then half a cosine over all epochs or the peak.

    With t in epochs and w epochs of warm-up: t < w: warmup_lr + (peak - warmup_lr) t / w;
    else: min_lr + (peak - min_lr) (1 + cos(pi t / epochs)) / 2, or with `shape = "constant"` the peak.

    t is epoch + step / steps_per_epoch, or with `per = "epoch"` what the DeiT reference uses: it steps timm 0.3.2's
    `CosineLRScheduler` after each epoch with that epoch's number, so t is one epoch late and epochs 0 and 1 are both 0.

    Args:
        peak: the learning rate that warm-up leads to, already scaled by the batch.
        epochs: epochs of the whole run.
        steps_per_epoch: updates in one epoch.
        epoch: from 0.
        step: update in the epoch, from 0.
    """
    time = max(0, epoch - 1) if schedule.per == "epoch" else epoch + step / steps_per_epoch
    if time < schedule.warmup_epochs:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * time / schedule.warmup_epochs
    if schedule.shape == "constant":
        return peak
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * time / epochs))
