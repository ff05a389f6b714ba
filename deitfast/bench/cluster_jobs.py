"""What a recipe's whole work takes on machines like this one: conversion, the teacher's targets, training."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from deitfast.bench.record import ClusterJob, FullRun, Measured, Scaling
from deitfast.bench.scaling import Cluster, gradient_bytes, scale
from deitfast.bench.suggestions import few_images
from deitfast.bench.timing import BenchCase, TimingOptions, measure
from deitfast.bench.verdict import CORES, Capacity, Cost
from deitfast.bench.workbench import Workbench
from deitfast.config.fit_to_data import share_of
from pipelines.storage.convert.split import convert_batch
from pipelines.storage.entry import InMemory
from pipelines.storage.formats.format import beton
from pipelines.storage.reader import RAW
from pipelines.storage.transcode import EncodeOptions

CONVERTED_IMAGES = 32
"""How many images are converted in one call."""
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
    if converting := conversion_case(bench):
        (found,) = measure([converting], bench.clock, timing)
        jobs.append(conversion_job(found, sum(split.samples for split in bench.dataset.spec.splits.values()), capacity))
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


def conversion_case(bench: Workbench) -> BenchCase | None:
    """Return what one process of `deitfast convert` does with some of the images as they are stored; none for raw ones.

    Their source may have been larger: it is gone.
    """
    reader = bench.reader
    encoded = np.flatnonzero(reader.modes != RAW)
    if not len(encoded):
        return None
    entries = few_images(reader, encoded, CONVERTED_IMAGES)
    source = InMemory("folder", f"a few images of {reader.path}", ("any",), {})
    call = partial(convert_batch, source, EncodeOptions(), beton().stored, entries)
    return BenchCase("converting", "as they are stored, by one process", None, len(entries), call)


def conversion_job(converting: Measured, images: int, capacity: Capacity) -> ClusterJob:
    """Return the conversion of `images` by one machine, which has a process on every core."""
    return ClusterJob("converting (one node)", images, capacity.cores / converting.cpu_seconds, CORES)
