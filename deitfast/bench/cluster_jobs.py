"""What a recipe's whole work takes on machines like this one: conversion, the teacher's targets, training."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch

from deitfast.bench.record import ClusterJob, FullRun, Scaling
from deitfast.bench.scaling import Cluster, gradient_bytes, scale
from deitfast.bench.suggestions import few_images
from deitfast.bench.timing import HOST, BenchCase, TimingOptions, measure
from deitfast.bench.verdict import CORES, Capacity, Cost
from deitfast.bench.workbench import Workbench
from deitfast.config.fit_to_data import share_of
from pipelines.errors import pluralize
from pipelines.storage.convert.split import BATCH_BYTES, BATCH_IMAGES, convert_batch
from pipelines.storage.entry import InMemory
from pipelines.storage.formats.format import beton
from pipelines.storage.reader import RAW
from pipelines.storage.transcode import EncodeOptions
from pipelines.workers import AHEAD, in_order

CONVERTED_IMAGES = 256
"""How many images are converted, again and again."""
TEACHER = "teacher"
"""The stage of a bench whose recipe asks a teacher."""


def predict_cluster(
    bench: Workbench, costs: list[Cost], capacity: Capacity, cluster: Cluster, run: FullRun, timing: TimingOptions
) -> Scaling:
    """Return what the recipe reaches on a cluster, and how long its work takes there.

    Args:
        bench: the recipe on its data set.
        costs: of every stage on one process.
        capacity: that process's loader threads, and the cores of the machine.
        cluster: the machines.
        run: the recipe's whole run.
        timing: how conversion is measured.
    """
    batch, gradients = bench.recipe.train.batch, gradient_bytes(bench.student.train_step.model)
    step_threads = torch.get_num_threads() if bench.runtime.device.type == "cpu" else 0
    predicted = partial(scale, capacity=capacity, cluster=cluster, batch=batch, step_threads=step_threads)
    training = predicted(costs, gradients=gradients)
    jobs = []
    if rate := conversion_rate(bench, capacity.cores, timing):
        images = sum(split.samples for split in bench.dataset.spec.splits.values())
        jobs.append(ClusterJob("converting (one node)", images, rate, CORES))
    if any(cost.stage == TEACHER for cost in costs):
        asked = predicted([cost for cost in costs if cost.stage != "step"], gradients=0)
        jobs.append(ClusterJob("asking the teacher", teacher_views(bench), asked.predicted, asked.limit))
    jobs.append(ClusterJob("training", run.images, training.predicted, training.limit))
    return replace(training, jobs=tuple(jobs))


def teacher_views(bench: Workbench) -> int:
    """Return the views of which `deitfast teach` asks the teacher: of every image all that the run looks at, or one."""
    recipe = bench.recipe
    views = 1 if recipe.distill.targets == "per_image" else recipe.views
    return share_of(bench.dataset.spec.splits["train"].counts, recipe.train.fraction) * views


def conversion_rate(bench: Workbench, workers: int, timing: TimingOptions) -> float | None:
    """Return the images/s at which `deitfast convert` would store some of the images again; None for raw ones.

    Its worker processes are at work on all cores, as cores that share a cache or a floating-point unit slow each other.
    Raw images are left out, as their source may have been larger: it is gone.
    """
    reader = bench.reader
    encoded = np.flatnonzero(reader.modes != RAW)
    if not len(encoded):
        return None
    entries = few_images(reader, encoded, CONVERTED_IMAGES)
    most = BATCH_BYTES * len(entries) // sum(entry.size for entry in entries)
    images = max(1, min(most, BATCH_IMAGES))
    source = InMemory("folder", f"a few images of {reader.path}", ("any",), {})
    work = partial(convert_batch, source, EncodeOptions(), beton().stored)
    tasks = ([entries[(start + n) % len(entries)] for n in range(images)] for start in count(0, images))
    with closing(in_order(work, tasks, workers)) as done:
        what = f"as they are stored, by {pluralize(workers, 'process')}"
        call, ahead = partial(next, done), AHEAD * workers
        case = BenchCase("converting", what, None, images, call, prefetched=ahead, worker_batches=workers)
        (found,) = measure([case], HOST, timing)
    return found.rate
