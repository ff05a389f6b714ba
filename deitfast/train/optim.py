"""The optimizer and its learning rate: what is decayed, what the batch makes of the rate, and how it changes."""

import math
import re
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from deitfast.config.recipe import OptimSpec, ScheduleSpec
from deitfast.train.lamb import Lamb
from pipelines.errors import UserError

HEAD = re.compile(r"(^|\.)(head|head_dist|fc)\.(weight|bias)$")
BLOCK = re.compile(r"(blocks\.\d+|layer\d+\.\d+|trunk_output\.block\d+\.block\d+-\d+)\.")
FINAL_NORM = re.compile(r"(^|\.)norm\.(weight|bias)$")
"""Names of parameters of the heads, of a block, and of the norm behind the last block."""
FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
"""Device types for which torch has fused optimizers: one kernel for all parameters instead of several for each."""


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


def freeze(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Have modules and parameters keep their weights, as timm's `freeze` does.

    Args:
        model: the model.
        names: of modules or parameters; "backbone" is all but the heads.

    Returns:
        The batch norms among them: in evaluation mode their running statistics stay as well.

    Raises:
        UserError: a name is not one of the model's, or nothing is left to train.
    """
    norms = []
    for name in names:
        if name == "backbone":
            inside = [key for key, _ in model.named_parameters() if not HEAD.search(key)]
        else:
            inside = [key for key, _ in model.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not inside:
            children = sorted({key.partition(".")[0] for key, _ in model.named_parameters()})
            raise UserError(
                f"optim.freeze: the network has no {name}", expected=f"backbone, {', '.join(children)}, ..."
            )
        for key in inside:
            model.get_parameter(key).requires_grad_(False)
        kept = [module for key, module in model.named_modules() if any(each.startswith(f"{key}.") for each in inside)]
        norms += [module for module in kept if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.freeze leaves nothing to train", remedy="freeze fewer modules")
    return norms


def layer_of(names: Iterable[str]) -> dict[str, int]:
    """Return the layer of every parameter, from 0, as timm groups them for `layer_decay`.

    The stem (patches, tokens, positions) is 0, then every block is one, the last one with the final norm, and the
    heads are the last.
    """
    names = list(names)
    matches = [match for name in names if (match := BLOCK.search(name))]
    blocks = list(dict.fromkeys(match[0] for match in matches))
    layers = {block: number for number, block in enumerate(blocks, start=1)}
    found: dict[str, int] = {}
    for name in names:
        block = BLOCK.search(name)
        if HEAD.search(name):
            found[name] = len(blocks) + 1
        elif block:
            found[name] = layers[block[0]]
        else:
            found[name] = len(blocks) if FINAL_NORM.search(name) else 0
    return found


def build_optimizer(model: nn.Module, spec: OptimSpec, batch: int) -> Optimizer:
    """Return the optimizer that the spec names, over the model's trainable parameters where they are now.

    Two groups, the decayed parameters first, both at the peak learning rate for a global `batch`. With `layer_decay`
    two for each layer, the heads' first, whose rates are `lr_scale` times that.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = layer_of(name for name, _ in model.named_parameters())
    top = max(layers.values())
    lr, groups = peak_lr(spec, batch), []
    for layer in range(top, -1, -1) if spec.layer_decay < 1 else [None]:
        own = [(name, parameter) for name, parameter in named if layer in (None, layers[name])]
        scale = 1.0 if layer is None else spec.layer_decay ** (top - layer)
        for decays in (True, False):
            params = [parameter for name, parameter in own if is_decayed(name, parameter, spec) == decays]
            if params or layer is None:
                decay = spec.weight_decay if decays else 0.0
                groups.append({"params": params, "weight_decay": decay, "lr": lr * scale, "lr_scale": scale})
    fused = all(parameter.device.type in FUSED_DEVICES for _, parameter in named)
    match spec.name:
        case "adamw":
            return AdamW(groups, lr=lr, betas=spec.betas, eps=spec.eps, fused=fused)
        case "adam":
            return Adam(groups, lr=lr, betas=spec.betas, eps=spec.eps, fused=fused)
        case "lamb":
            return Lamb(groups, lr=lr, betas=spec.betas, eps=spec.eps)
        case "sgd":
            return SGD(groups, lr=lr, momentum=spec.momentum, nesterov=spec.momentum > 0, fused=fused)


def learning_rate(
    schedule: ScheduleSpec, peak: float, epochs: int, steps_per_epoch: int, epoch: int, step: int
) -> float:
    """Return the learning rate of one step: linear warm-up, then half a cosine over all epochs or the peak.

    With t in epochs and w epochs of warm-up: t < w: warmup_lr + (peak - warmup_lr) t / w;
    else: min_lr + (peak - min_lr) (1 + cos(pi t / epochs)) / 2, or with `shape = "constant"` the peak, or
    with `shape = "step"` peak * step_factor^floor(t / step_epochs).

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
    if schedule.shape == "step":
        return peak * schedule.step_factor ** (time // schedule.step_epochs)
    return schedule.min_lr + 0.5 * (peak - schedule.min_lr) * (1 + math.cos(math.pi * time / epochs))
