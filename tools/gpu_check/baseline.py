"""The usual way to train DeiT: DataLoader, PIL, timm's transform, a teacher run on every batch, a compiled step."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from deitfast.bench.baseline_loaders import WorkerBatches, loading_alone, timm_batches
from deitfast.bench.baselines import DATALOADER
from deitfast.bench.record import Figure
from deitfast.bench.stages import LEARNING_RATE
from deitfast.bench.timing import BenchCase, measure
from tools.gpu_check.context import Context, Note, rates


def teacher(context: Context) -> Iterator[Figure | Note]:
    """The teacher's forward pass on a batch."""
    inputs = context.bench.augmented_to(context.bench.batch)
    model, what = context.teacher
    case = BenchCase("", what, None, len(inputs.labels), lambda: model.get(inputs), on_device=True)
    (found,) = measure([case], context.bench.clock, context.timing)
    yield rates(found, "teacher, forward")


def baseline(context: Context) -> Iterator[Figure | Note]:
    """That loader alone, then all of it end to end."""
    with closing(context.bench.changed([], context.photos.plain)) as bench, ExitStack() as stack:
        loaded = timm_batches(bench, stack)
        (found,) = measure([loading_alone(loaded, context.runtime.device)], bench.clock, context.timing)
        yield rates(found, DATALOADER)
        (found,) = measure([end_to_end(context, loaded)], bench.clock, context.timing)
        yield rates(found, "the usual way, end to end")


def end_to_end(context: Context, loaded: WorkerBatches) -> BenchCase:
    """Return loading, mixing, the teacher's forward pass and our compiled step as one call for a whole batch."""
    from timm.data.mixup import Mixup

    bench, device = context.bench, context.runtime.device
    model, name = context.teacher
    train_step, size = bench.student.train_step, bench.recipe.train.batch
    like = train_step.prepare(bench.augmented_to(bench.batch), 0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(bench.dataset.spec.classes))

    def train() -> None:
        parts = [next(loaded.batches) for _ in range(size // loaded.size)]
        images, labels = (torch.cat([part[at].to(device, non_blocking=True) for part in parts]) for at in range(2))
        mixed, _ = mixup(images, labels)
        pixels = mixed.to(bench.runtime.input_dtype).contiguous(memory_format=torch.channels_last)
        inputs = replace(like, pixels=pixels, labels=labels, mix_labels=labels)
        train_step.step(inputs, model.get(inputs), LEARNING_RATE)

    what = f"{loaded.what}; Mixup, {name}, our step"
    prefetched = -(-loaded.prefetched * loaded.size // size)
    return BenchCase(
        "", what, None, size, train, prefetched=prefetched, on_device=True, worker_pids=lambda: loaded.pids
    )
