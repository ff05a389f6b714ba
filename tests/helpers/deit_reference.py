"""facebookresearch/deit's training loop (main.py, engine.py and losses.py), of timm's parts; batches are deitfast's."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data.mixup import one_hot
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, NativeScaler
from torch import Tensor, nn
from torch.nn import functional as F

from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_split, open_training
from deitfast.train.stochastic_depth import draw_kept
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.rng.view_params import ViewParams
from pipelines.storage.dataset import Dataset
from tests.helpers.small_runs import CPU

DEPTH, WIDTH, CLASSES = 2, 128, 10


@dataclass
class Learned:
    """What a training did, step by step, and what it ended with."""

    losses: list[float] = field(default_factory=list)
    rates: list[dict[str, float]] = field(default_factory=list)
    """Each step's learning rate of every parameter."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    """Cross-entropy of the published prediction over the validation images, by weights: val, val_ema."""
    clipped: int = 0
    """Steps whose gradient was longer than allowed."""


def network(*, distilled: bool, size: int = 32, patch: int = 16, **options: Any) -> Any:
    """Return timm's DeiT of two small blocks with two heads."""
    name = f"deit_tiny{'_distilled' if distilled else ''}_patch16_224"
    options |= {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": WIDTH // 64}
    return timm.create_model(name, img_size=size, patch_size=patch, num_classes=CLASSES, **options)


class DistillationLoss(nn.Module):
    """losses.py, line by line."""

    def __init__(self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base_criterion, self.teacher_model, self.distillation_type = base, teacher, kind
        self.alpha, self.tau = alpha, tau

    def forward(self, inputs: Tensor, outputs: Any, labels: Tensor) -> Tensor:
        outputs_kd = None
        if not isinstance(outputs, Tensor):
            outputs, outputs_kd = outputs
        base_loss = self.base_criterion(outputs, labels)
        if self.teacher_model is None:
            return base_loss
        with torch.no_grad():
            teacher_outputs = self.teacher_model(inputs)
        assert outputs_kd is not None
        if self.distillation_type == "soft":
            T = self.tau
            distillation_loss = F.kl_div(
                F.log_softmax(outputs_kd / T, dim=1),
                F.log_softmax(teacher_outputs / T, dim=1),
                reduction="sum",
                log_target=True,
            ) * (T * T) / outputs_kd.numel()  # fmt: skip
        else:
            distillation_loss = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
        return base_loss * (1 - self.alpha) + distillation_loss * self.alpha


def train_as_deit(dataset: Dataset, recipe: Recipe, start: dict[str, Tensor], teacher: nn.Module | None) -> Learned:
    """Train timm's network from `start` on the batches of a recipe, as main.py does."""
    found, optim, train = Learned(), recipe.optim, recipe.train
    model = network(distilled=teacher is not None, drop_path_rate=recipe.model.drop_path)
    model.load_state_dict(start)
    if teacher is not None:
        model.set_distilled_training(True)
        teacher.eval()
    ema = ModelEmaV2(model, decay=train.ema) if train.ema else None
    peak = optim.lr * train.batch / optim.lr_batch
    moments: Any = {"momentum": optim.momentum} if optim.name == "sgd" else {"betas": optim.betas, "eps": optim.eps}
    layer_decay = optim.layer_decay if optim.layer_decay < 1 else None
    optimizer = create_optimizer_v2(
        model, opt=optim.name, lr=peak, weight_decay=optim.weight_decay, layer_decay=layer_decay, **moments
    )
    with closing(open_training(dataset, recipe, CPU)) as loader:
        steps = loader.steps_per_epoch
        schedule, scale = recipe.schedule, 1 if recipe.schedule.per == "epoch" else steps
        scheduler = CosineLRScheduler(
            optimizer, t_initial=train.epochs * scale, lr_min=schedule.min_lr, warmup_lr_init=schedule.warmup_lr,
            warmup_t=int(schedule.warmup_epochs * scale), t_in_epochs=schedule.per == "epoch",
        )  # fmt: skip
        criterion = DistillationLoss(
            base_loss(recipe), teacher, recipe.distill.mode, recipe.distill.alpha, recipe.distill.tau
        )
        loss_scaler, updates = NativeScaler(device="cpu"), 0
        for epoch in range(train.epochs):
            for samples, targets, params in batches(loader, recipe, epoch):
                model.train()
                drop_as_drawn(model, params, epoch, train.seed)
                loss = criterion(samples, model(samples), targets)
                found.losses.append(loss.item())
                found.rates.append(rates_of(model, optimizer))
                optimizer.zero_grad()
                loss_scaler(loss, optimizer, clip_grad=optim.clip or None, parameters=list(model.parameters()))
                if optim.clip:
                    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
                    found.clipped += bool(norm > 0.999 * optim.clip)
                if ema is not None:
                    ema.decay = min(train.ema, (1 + updates) / (10 + updates))  # the one departure that `Ema` states
                    ema.update(model)
                updates += 1
                if schedule.per == "step":
                    scheduler.step_update(updates)
            scheduler.step(epoch)
    found.weights = model.state_dict()
    found.evaluated["val"] = evaluate(model, dataset, recipe)
    if ema is not None:
        found.averages = ema.module.state_dict()
        found.evaluated["val_ema"] = evaluate(ema.module, dataset, recipe)
    return found


def base_loss(recipe: Recipe) -> nn.Module:
    """Return main.py's criterion of the labels."""
    if recipe.mixes:
        return SoftTargetCrossEntropy()  # smoothing is in the mixed target
    return LabelSmoothingCrossEntropy(recipe.train.smoothing) if recipe.train.smoothing else nn.CrossEntropyLoss()


def batches(loader: Any, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor, ViewParams]]:
    """Yield an epoch's pixels [B, 3, S, S] and targets, as timm's Mixup writes them, and the rows' draws."""
    for batch in loader.epoch(epoch):
        inputs = augment(batch, recipe.augment, dtype=torch.float32, train=True)
        targets = mixed_target(inputs, recipe.train.smoothing) if recipe.mixes else inputs.labels
        yield inputs.pixels, targets, inputs.params


def mixed_target(inputs: AugmentedBatch, smoothing: float) -> Tensor:
    """timm's `mixup_target`, with a lam for each row."""
    off = smoothing / CLASSES
    own, partner = (one_hot(y, CLASSES, 1 - smoothing + off, off) for y in (inputs.labels, inputs.mix_labels))
    lam = inputs.lam[:, None]
    return own * lam + partner * (1 - lam)


def drop_as_drawn(model: Any, params: ViewParams, epoch: int, seed: int) -> None:
    """Have timm's stochastic depth drop in the next step what a run of ours draws for it; the rest is timm's."""
    branches = [branch for block in model.blocks for branch in (block.drop_path1, block.drop_path2)]
    rates = [getattr(branch, "drop_prob", 0.0) for branch in branches]
    kept = torch.from_numpy(draw_kept(rates, params, epoch, seed))
    for branch, rate, rows in zip(branches, rates, kept.unbind(1), strict=True):
        if rate:
            factors = (rows / (1 - rate)).view(-1, 1, 1)
            branch.forward = lambda x, own=branch, factors=factors: x * factors if own.training else x


def rates_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return every parameter's learning rate by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, recipe: Recipe) -> float:
    """Return engine.py's test loss over the validation images."""
    model.eval()
    total, count = 0.0, 0
    with closing(open_split(dataset, "val", recipe, CPU)) as loader:
        for batch in loader.epoch(0):
            inputs = augment(batch, recipe.augment, dtype=torch.float32, train=False)
            each = F.cross_entropy(model(inputs.pixels), inputs.labels, reduction="none")[inputs.valid]
            total, count = total + each.sum().item(), count + len(each)
    return total / count
