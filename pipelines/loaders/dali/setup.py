"""What the dali loader's graph is built from: sizes, memory, and the hardware decoder's share of the images."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from nvidia import dali

from pipelines.loaders.batch_plan import BatchPlan
from pipelines.loaders.dali.calibration import decoder_share
from pipelines.loaders.dali.decode_once import decode_once
from pipelines.loaders.dali.graph import DEVICE_PADDING, Graph, GraphSpec
from pipelines.loaders.dali.source import EncodedImages
from pipelines.loaders.prefetch import QUEUED

MAX_GPU_THREADS = 16
"""Most decoding threads with a GPU: they only check bytes and parse headers, and each costs 16 MiB of GPU memory."""
DIFFERENT = 4
"""Steps whose images a graph's rate is measured on, in turn."""
WARM, TIMED = DIFFERENT, 6
"""Runs of a graph before its rate is measured, so that DALI has memory for each of the steps, and while it is."""


def graph_spec(plan: BatchPlan, source: EncodedImages) -> GraphSpec:
    """Return what the graph is built from; on CUDA the hardware decoder's share is measured unless it is known."""
    views, reader = plan.augment.repeats if plan.train else 1, plan.reader
    spec = GraphSpec(
        images=most_images(plan, views),
        views=views,
        side=plan.augment.size,
        framed=not plan.train or plan.augment.crop != "resized",
        threads=min(plan.workers, MAX_GPU_THREADS) if plan.device.type == "cuda" else plan.workers,
        depth=plan.spec.prefetch,
        device=plan.device,
        interpolation=plan.interpolation,
        typical=int(np.median(reader.heights.astype(np.int64) * reader.widths)) * 3,
    )
    share = plan.spec.hw_decoder_load
    if share != "auto":
        return replace(spec, hw_decoder_load=share)
    if plan.device.type != "cuda":
        return spec  # there is no hardware decoder
    stored = int(np.median(reader.sizes))
    key = (
        f"{torch.cuda.get_device_name(plan.device)}, DALI {dali.__version__}, {spec.threads} threads, "
        f"2^{stored.bit_length()} bytes and 2^{spec.typical.bit_length()} decoded an image, "
        f"{plan.spec.step_rate:g} views/s"
    )
    share = decoder_share(key, lambda share: rate(plan, source, spec, share), plan.spec.step_rate)
    return replace(spec, hw_decoder_load=share)


def most_images(plan: BatchPlan, views: int) -> int:
    """Return the most images that one run decodes: what steps hold repeats every `views` steps."""
    steps = (plan.sampler.rows(0, step) for step in range(min(views, plan.sampler.steps_per_epoch)))
    counts = (np.unique(rows.samples[rows.valid], return_counts=True)[1] for rows in steps)
    return max(1, *(int((-(-count // views)).sum()) for count in counts))


def memory(plan: BatchPlan, spec: GraphSpec, *, largest: bool) -> dict[str, int]:
    """Return the bytes of each buffer, on the GPU, or without one on the host.

    With D runs under way, n images of R views in each and crops of S x S x 3 bytes: D x n decoded images (`largest`:
    the n largest of the split, which bounds it; else n average ones); the n x R crops of D + 1 runs, one of them being
    gathered; R batches begun and one that is being augmented; what augmentation has made of one batch that waits and,
    before a GPU, of `QUEUED` (without one, of the one at the step), in bfloat16 (float32); and on CUDA 16 MiB for each
    decoding thread, with as much again in page-locked host memory.
    """
    sizes = plan.reader.heights.astype(np.int64) * plan.reader.widths * 3
    images = np.sort(sizes)[-spec.images :].sum() if largest else sizes.mean() * spec.images
    crop, rows, cuda = spec.side**2 * 3, len(plan.sampler.rows(0, 0).samples), spec.device.type == "cuda"
    return {
        "decoded images": spec.depth * int(images),
        "crops": (spec.depth + 1) * spec.images * spec.views * crop,
        "batches": (spec.views + 1) * rows * crop,
        "augmented": (1 + QUEUED) * rows * crop * 2 if cuda else 2 * rows * crop * 4,
        "decoder": spec.threads * DEVICE_PADDING if cuda else 0,
    }


def rate(plan: BatchPlan, source: EncodedImages, spec: GraphSpec, share: float) -> float:
    """Return views/s of a graph that gives the hardware decoder a share, over the first steps' images."""
    works = decode_once(lambda step: plan.draw(0, step), range(plan.sampler.steps_per_epoch), spec.views)
    with ThreadPoolExecutor(spec.threads) as pool:
        runs = [
            (*source.fetch(pool, work)[:2], int((work.destination >= 0).sum()))
            for work in islice(works, DIFFERENT)
            if len(work.samples)
        ]
    graph = Graph(replace(spec, hw_decoder_load=share))

    def decode(count: int) -> int:
        views = 0
        for number in range(count + spec.depth):
            if number >= spec.depth:
                graph.take()
            if number < count:
                encoded, geometry, cut = runs[number % len(runs)]
                graph.start(encoded, geometry)
                views += cut
        if spec.device.type == "cuda":
            torch.cuda.synchronize(spec.device)
        return views

    decode(WARM)
    began = time.perf_counter()
    return decode(TIMED) / (time.perf_counter() - began)
