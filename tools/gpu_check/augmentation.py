"""The augmentation kernels at full size: compared with the reference bit for bit, and timed."""

from collections.abc import Iterator
from itertools import islice

import torch

from deitfast.bench.record import Figure
from deitfast.bench.stages import step_alone
from deitfast.bench.timing import measure
from deitfast.models.vit import reads_patches
from pipelines.augment.chain import augment
from tools.gpu_check.context import Context, Note
from tools.gpu_check.kernel_times import augment_times, place_times

MOST_OF_A_STEP = 0.02
"""Share of a step that augmentation is to take at most."""
BATCHES = 2


def equality(context: Context) -> Iterator[Figure | Note]:
    """Rows in which the kernels' input differs from the reference's by a bit, on whole batches."""
    spec, patch = context.bench.recipe.augment, context.bench.recipe.model.patch
    for dtype in (torch.float32, torch.bfloat16) if context.cuda else (torch.float32,):  # the interpreter cuts bf16 off
        off = []
        for batch in islice(context.bench.batches(), BATCHES if context.cuda else 1):
            ours, theirs = (
                augment(batch, spec, dtype=dtype, train=True, patch=patch, kernels=kernels) for kernels in ("on", "off")
            )
            off.append(float((ours.pixels != theirs.pixels).flatten(1).any(1).sum()))
        name = str(dtype).removeprefix("torch.")
        what = f"of {context.bench.recipe.train.batch:,} a batch"
        yield Figure(f"rows that differ from the reference, {name}", "count", tuple(off), what, most=0)


def times(context: Context) -> Iterator[Figure | Note]:
    """Kernels and reference one after the other by the GPU's clock, and the kernels' share of a step.

    Placing the decoder's crops in the batch is timed by itself: the loader does it, not augmentation.
    """
    bench = context.bench
    patch = reads_patches(bench.student.train_step.model)
    found = augment_times(
        bench.batch, bench.recipe.augment, dtype=bench.runtime.input_dtype, patch=patch, runs=context.scale.runs
    )
    for name, milliseconds in found.items():
        yield Figure(f"augmentation, {name}", "ms", tuple(milliseconds), "a batch")
    for name, milliseconds in place_times(bench.batch, runs=context.scale.runs).items():
        yield Figure(f"placing crops, {name}", "ms", tuple(milliseconds), "a batch")
    (step,) = measure([step_alone(bench)], bench.clock, context.timing)
    a_step = step.seconds * bench.recipe.train.batch * 1000
    shares = tuple(each / a_step for each in found["kernels"])
    yield Figure("augmentation, kernels, of a step", "share", shares, f"of {a_step:.1f} ms", most=MOST_OF_A_STEP)
