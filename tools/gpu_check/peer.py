"""What people run today: a DataLoader over PIL with timm's transform, a compiled step, a teacher that looks on."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from deitfast.bench.peer_loaders import Loaded, loading_alone, timm_batches
from deitfast.bench.peers import DATALOADER
from deitfast.bench.stages import LEARNING_RATE
from deitfast.bench.timing import Work, measure
from tools.gpu_check.lab import Lab, rates
from tools.gpu_check.record import Figure, Note


def teacher(lab: Lab) -> Iterator[Figure | Note]:
    """The teacher's forward pass on a batch."""
    inputs, looks = lab.bench.prepared(lab.bench.held), lab.teacher
    work = Work("", looks.what, None, len(inputs.labels), lambda: looks.find(inputs), on_device=True)
    (found,) = measure([work], lab.bench.clock, lab.pace)
    yield rates(found, "teacher, forward")


def peer(lab: Lab) -> Iterator[Figure | Note]:
    """That loader alone, then all of it end to end."""
    with closing(lab.bench.changed([], lab.photos.plain)) as bench, ExitStack() as stack:
        loaded = timm_batches(bench, stack)
        (found,) = measure([loading_alone(loaded, lab.runtime.device)], bench.clock, lab.pace)
        yield rates(found, DATALOADER)
        (found,) = measure([end_to_end(lab, loaded)], bench.clock, lab.pace)
        yield rates(found, "what people run, end to end")


def end_to_end(lab: Lab, loaded: Loaded) -> Work:
    """Return loading, mixing, asking the teacher and our compiled step as one call for a whole batch."""
    from timm.data.mixup import Mixup

    bench, looks, device = lab.bench, lab.teacher, lab.runtime.device
    like, size = bench.prepared(bench.held), bench.recipe.train.batch
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(bench.dataset.spec.classes))

    def train() -> None:
        parts = [next(loaded.batches) for _ in range(size // loaded.size)]
        images, labels = (torch.cat([part[at].to(device, non_blocking=True) for part in parts]) for at in range(2))
        mixed, _ = mixup(images, labels)
        pixels = mixed.to(bench.runtime.input_dtype).contiguous(memory_format=torch.channels_last)
        inputs = replace(like, pixels=pixels, labels=labels, mix_labels=labels)
        bench.learner.step(inputs, looks.find(inputs), LEARNING_RATE, 0)

    what = f"{loaded.what}; Mixup, {looks.what}, our step"
    ahead = -(-loaded.ahead * loaded.size // size)
    return Work("", what, None, size, train, ahead=ahead, on_device=True, processes=lambda: loaded.processes)
