"""The training step: forward, loss, backward, update. The whole state that learning changes lives here."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deitfast.config.recipe import Recipe
from deitfast.models.vit import VisionTransformer, build_model
from deitfast.runtime import Runtime
from deitfast.train.ema import Ema
from deitfast.train.losses import PARTS, distilled_loss, mixed_binary_cross_entropy, mixed_cross_entropy
from deitfast.train.optim import build_optimizer, freeze
from deitfast.train.stochastic_depth import draw_kept, dropout_seed
from pipelines.augment.chain import AugmentedBatch
from pipelines.device import to_device

LARGEST_GRAPHED_SIDE = 64
"""Side of the input in pixels up to which `train.compile` auto takes CUDA graphs: larger steps keep the GPU busy."""


@dataclass(frozen=True)
class StepInputs(AugmentedBatch):
    """What a step takes: an augmented batch, and what is drawn of what the model drops on it."""

    kept: Tensor | None = None
    """Which rows keep which residual branches, bool [B, branches], on the device; None: nothing is dropped."""
    dropout_seed: int = 0
    """What dropout draws from."""


class TrainStep:
    """A model and everything that trains it."""

    def __init__(
        self,
        recipe: Recipe,
        classes: int,
        runtime: Runtime,
        init_weights: Callable[[nn.Module], dict[str, str]] | None = None,
    ) -> None:
        """Build model, optimizer, averaged weights and gradient scaler from the recipe.

        The initialization depends on `train.seed` alone, so every rank starts from the same weights. `init_weights` may
        put others in their place, before anything is derived from them, and describes them.
        """
        self.recipe, self.runtime = recipe, runtime
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe.model, size=recipe.augment.size, classes=classes, distilled=recipe.distilled)
        self.initial_weights = init_weights(model) if init_weights else {}
        """What `init_weights` says of the weights that it put in; empty without."""
        # built on the CPU whatever the device: the same seed gives the same weights everywhere
        self.model: nn.Module = model.to(runtime.device).to(memory_format=torch.channels_last)  # pyright: ignore
        self.frozen_norms = freeze(self.model, recipe.optim.freeze)
        """Batch norms that keep their running statistics as well."""
        self.optimizer = build_optimizer(self.model, recipe.optim, recipe.train.batch)
        self.ema = Ema(self.model, recipe.train.ema) if recipe.train.ema else None
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
        distill, train = recipe.distill, recipe.train
        binary = partial(mixed_binary_cross_entropy, threshold=train.bce_threshold)
        self.loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = partial(
            distilled_loss, mode=distill.mode, head=distill.head, alpha=distill.alpha, tau=distill.tau,
            normalization=distill.normalization, smoothing=train.smoothing,
            labeled_loss=mixed_cross_entropy if train.loss == "cross_entropy" else binary,
        )  # fmt: skip
        self.accumulate = recipe.train.accumulate
        """Micro-batches of a step, one after the other, whose gradients are summed."""
        self.graphs = runtime.compile and takes_graphs(recipe, runtime)
        if runtime.compile:
            self._compile()
        self.ddp_model = self.model
        if runtime.world > 1:
            keep_gradient_layout(self.model)
            self.ddp_model = DistributedDataParallel(self.model)

    def _compile(self) -> None:
        """Compile model, averaged model and loss, each as one graph or not at all, for the shapes they are used with.

        In place and before DDP wraps the model, which is what both want.
        """
        how: Any = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead" if self.graphs else None}
        self.model.compile(**how)
        if self.ema:
            self.ema.model.compile(**how)
        self.loss = torch.compile(self.loss, **how)

    def prepare(self, inputs: AugmentedBatch, epoch: int) -> StepInputs:
        """Draw what the model drops on a batch in an epoch (from 0): a function of its samples and views.

        May be called in the thread that makes batches.
        """
        kept, seed = None, self.recipe.train.seed
        if isinstance(self.model, VisionTransformer) and any(rates := self.model.drop_rates()):
            drawn = torch.from_numpy(draw_kept(rates, inputs.params, epoch, seed))
            kept = to_device(drawn, self.runtime.device)
        return StepInputs(**vars(inputs), kept=kept, dropout_seed=dropout_seed(inputs.params, epoch, seed))

    def step(self, inputs: StepInputs, teacher: Tensor | None, lr: float) -> Tensor:
        """Update the model on one rank's batch.

        Args:
            inputs: what `prepare` returned.
            teacher: int64 [B] labels (hard) or float [B, C] logits (soft); None without distillation.
            lr: learning rate of this update.

        Returns:
            float32 [3] on the device, detached: total, base and distillation loss, averaged over the batch.
        """
        self.ddp_model.train()
        for norm in self.frozen_norms:
            norm.eval()
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.recipe.model.dropout:
            torch.manual_seed(inputs.dropout_seed)
        micro_batches = split_batch(inputs, teacher, self.accumulate)
        losses = torch.zeros(len(PARTS), device=self.runtime.device)
        for number, (micro, target) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last or self.ddp_model is self.model else self.ddp_model.no_sync():  # pyright: ignore
                with self.runtime.autocast():
                    heads = self.ddp_model(*model_inputs(micro))
                total, parts = self.loss(heads, micro.labels, micro.mix_labels, micro.lam, target, micro.valid)
                self.scaler.scale(total / len(micro_batches)).backward()
            losses += torch.stack([parts[name] for name in PARTS]) / len(micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.recipe.optim.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model)
        return losses

    def fits(self, inputs: StepInputs, teacher: Tensor | None) -> bool:
        """Return whether a step on such a batch fits the device's memory, by trying one that changes nothing.

        Forward and backward of one micro-batch, with room for what the first update will allocate: two moments of
        every parameter. No rank waits for another here.
        """
        micro, target = split_batch(inputs, teacher, self.accumulate)[0]
        buffers = [buffer.clone() for buffer in self.model.buffers()]  # a CNN's running statistics
        try:
            reserve = [torch.empty_like(parameter) for parameter in self.model.parameters() for _ in range(2)]
            self.model.train()
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self.runtime.autocast():
                heads = self.model(*model_inputs(micro))
            total, _ = self.loss(heads, micro.labels, micro.mix_labels, micro.lam, target, micro.valid)
            self.scaler.scale(total).backward()
            del reserve
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self.runtime.device.type == "cuda":
                torch.cuda.empty_cache()

    def state(self) -> dict[str, Any]:
        """Return all that learning has changed, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])


def keep_gradient_layout(model: nn.Module) -> None:
    """Have every gradient lie in memory as its parameter does, also where a dimension is 1 and strides mean nothing.

    DDP compares all strides; where they differ (tokens that were concatenated, 1 x 1 convolutions of cuDNN) it warns,
    and copies gradients to its buckets more slowly.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_laid_out, parameter.shape, parameter.stride()))


def _laid_out(shape: torch.Size, stride: tuple[int, ...], gradient: Tensor) -> Tensor:
    if gradient.stride() == stride:
        return gradient
    differing = [size for size, one, other in zip(shape, gradient.stride(), stride, strict=True) if one != other]
    return gradient.as_strided(shape, stride) if max(differing) == 1 else gradient


def takes_graphs(recipe: Recipe, runtime: Runtime) -> bool:
    """Return whether `train.compile` means CUDA graphs as well."""
    train = recipe.train
    small = recipe.augment.size <= LARGEST_GRAPHED_SIDE and train.accumulate == 1
    alone = runtime.device.type == "cuda" and runtime.world == 1
    return train.compile == "graphs" or (train.compile == "auto" and small and alone)


def model_inputs(inputs: StepInputs) -> tuple[Tensor, ...]:
    """Return what a model's `forward` takes of a batch."""
    return (inputs.pixels,) if inputs.kept is None else (inputs.pixels, inputs.kept)


def split_batch(inputs: StepInputs, teacher: Tensor | None, count: int) -> list[tuple[StepInputs, Tensor | None]]:
    """Return a batch and its targets as `count` micro-batches of equal size, in order, as views of the same memory."""
    if count == 1:
        return [(inputs, teacher)]
    rows = len(inputs.labels) // count
    tensors = {
        field.name: value for field in fields(inputs) if isinstance(value := getattr(inputs, field.name), Tensor)
    }
    return [
        (
            replace(inputs, **{name: value[cut] for name, value in tensors.items()}),
            None if teacher is None else teacher[cut],
        )
        for cut in (slice(number * rows, (number + 1) * rows) for number in range(count))
    ]
