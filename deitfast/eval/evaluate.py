"""Masked evaluation: every validation image once, whatever the batch and the number of processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deitfast.config.recipe import Recipe
from deitfast.eval.metrics import Metrics, measure
from deitfast.models.vit import joint, reads_patches
from deitfast.runtime import Runtime
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch, Loader
from pipelines.device import explain_oom
from pipelines.errors import DeitfastError, UserError

HEADS = ("class", "distillation")
"""Names of a model's heads, in the order of its outputs."""


def final_head(results: Mapping[str, object], prediction: str = "auto") -> str:
    """Return the name of the head whose prediction is the model's.

    Args:
        results: something of each head.
        prediction: `model.prediction` of the recipe; auto: "joint" with two heads, else "class".
    """
    if prediction in results:
        return prediction
    return "joint" if "joint" in results else "class"


def evaluate(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    runtime: Runtime,
    classes: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Metrics]:
    """Measure every head over one pass of an evaluation loader; under torch.distributed, over all ranks' shards.

    Every rank must call it and gets the same result. The model's training mode is as before when it returns.

    Args:
        model: maps pixels [B, 3, S, S], or patches where it takes them, to (class logits,) or (class logits,
            distillation logits).
        loader: gives this rank's batches; rows that are not `valid` are ignored.
        recipe: how images are normalized, and what does it (`train.kernels`).
        runtime: device and precision of the model.
        classes: width that the heads must have.
        progress: called after each batch with (batches done, batches in all).

    Returns:
        "class", and with two heads "distillation" and "joint" (the mean of the logits): see `final_head`.

    Raises:
        UserError: heads of another width.
        DeitfastError: nothing to evaluate, labels outside the classes, or logits that are not finite.
    """
    found = predict(model, loader, recipe, runtime, progress=progress)
    if found.heads[0].shape[1] != classes:
        raise UserError(
            f"the model has {found.heads[0].shape[1]} classes, the data set {classes}",
            remedy="evaluate on the data set that the model was trained for",
        )
    return measured(found.heads, found.labels)


def measured(heads: tuple[Tensor, ...], labels: Tensor) -> dict[str, Metrics]:
    """Return the metrics of every head's logits [N, C] against labels [N], and of two heads' mean."""
    results = {name: measure(head, labels) for name, head in zip(HEADS, heads, strict=False)}
    if len(heads) > 1:
        results["joint"] = measure(joint(heads), labels)
    return results


class Predictions(NamedTuple):
    """What a model says of a split."""

    heads: tuple[Tensor, ...]
    """Each head's logits, float32 [N, C]."""
    labels: Tensor
    """int64 [N]."""
    samples: Tensor
    """int64 [N]: the images' places in the split."""


def predict(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    runtime: Runtime,
    *,
    outputs: Sequence[int] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Predictions:
    """Return the logits of every image that can be read, in the order of the split, over all ranks.

    Every rank must call it. Arguments are those of `evaluate`, and:

    Args:
        outputs: which of the model's outputs stands for each class of the data set; None: all of them, in order.

    Raises:
        DeitfastError: there is nothing to evaluate.
    """
    was_training = model.training
    model.eval()
    try:
        with explain_oom("evaluation", "lower train.batch: evaluation takes no larger one"):
            chosen = None if outputs is None else torch.tensor(outputs, device=runtime.device)
            heads, labels, samples = _predict(model, loader, recipe, runtime, chosen, progress)
    finally:
        model.train(was_training)
    heads, labels, samples = tuple(gather(head) for head in heads), gather(labels), gather(samples)
    order = samples.argsort()
    return Predictions(tuple(head[order] for head in heads), labels[order], samples[order])


@dataclass(frozen=True)
class Agreement:
    """How far one loader's predictions are from another's on the same images."""

    images: int
    changed: int
    """Images whose predicted class differs."""
    top1: float
    """Top-1 minus the other's."""
    logits: float
    """Largest difference of any logit."""
    margin: float
    """Largest lead of the other's prediction over its runner-up among the changed ones: how near ties they were."""


def agreement(heads: tuple[Tensor, ...], others: tuple[Tensor, ...], labels: Tensor) -> Agreement:
    """Compare the published predictions of two passes over the same images, logits [N, C] each."""
    one, other = joint(heads), joint(others)
    changed = one.argmax(1) != other.argmax(1)
    best = other.topk(min(2, other.shape[1]), dim=1).values
    leads = best[:, 0] - best[:, -1]
    top1 = (one.argmax(1) == labels).double().mean() - (other.argmax(1) == labels).double().mean()
    return Agreement(
        len(labels),
        int(changed.sum()),
        float(top1),
        float((one - other).abs().max()),
        float(leads[changed].max()) if changed.any() else 0.0,
    )


def gather(rows: Tensor) -> Tensor:
    """Return all ranks' rows [N_rank, ...] one after another, on every rank; without torch.distributed the rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    device = rows.device if "nccl" in dist.get_backend() else torch.device("cpu")
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    most = max(int(count) for count in counts)
    padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shards, padded)
    return torch.cat([shard[: int(count)] for shard, count in zip(shards, counts, strict=True)])


@torch.no_grad()
def _predict(
    model: nn.Module,
    loader: Loader,
    recipe: Recipe,
    runtime: Runtime,
    outputs: Tensor | None,
    progress: Callable[[int, int], object] | None,
) -> Predictions:
    """Return what `predict` does of this rank's valid rows, on the device."""
    logits: list[tuple[Tensor, ...]] = []
    labels: list[Tensor] = []
    samples: list[Tensor] = []
    valid: list[Tensor] = []
    patch, kernels = reads_patches(model), recipe.train.kernels

    def augmented(batch: Batch) -> AugmentedBatch:
        return augment(batch, recipe.augment, dtype=runtime.input_dtype, train=False, patch=patch, kernels=kernels)

    for done, inputs in enumerate(loader.epoch(0, then=augmented), start=1):
        with runtime.autocast():
            heads = model(inputs.pixels)
        if outputs is not None:
            heads = tuple(head.index_select(1, outputs) for head in heads)
        # copies, as a model in a CUDA graph writes its next logits over these
        logits.append(tuple(head.to(torch.float32, copy=True) for head in heads))
        del heads  # what is still held when the next batch comes, CUDA graphs record another graph behind
        labels.append(inputs.labels)
        samples.append(torch.from_numpy(inputs.params.sample.astype(np.int64)))
        valid.append(inputs.valid)
        if progress:
            progress(done, loader.steps_per_epoch)
    if not logits:
        raise DeitfastError("no image to evaluate", expected="a validation split with images")
    # Masked once at the end: only the device knows a mask's size, and asking for it each batch would stall it.
    kept = torch.cat(valid)
    everyone = torch.cat(samples).to(kept.device)[kept]
    return Predictions(
        tuple(torch.cat(parts)[kept] for parts in zip(*logits, strict=True)), torch.cat(labels)[kept], everyone
    )
