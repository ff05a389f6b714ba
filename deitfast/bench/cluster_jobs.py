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
from deitfast.bench.verdict import CORES, Capacity, Cost, cost_of
from deitfast.bench.workbench import Workbench
from deitfast.config.fit_to_data import share_of
from deitfast.distill.targets import OnlineTeacher
from deitfast.distill.teacher import Teacher, load_teacher
from pipelines.errors import UserError, pluralize
from pipelines.storage.convert.split import BATCH_BYTES, BATCH_IMAGES, convert_batch
from pipelines.storage.entry import InMemory
from pipelines.storage.formats.format import beton
from pipelines.storage.reader import RAW
from pipelines.storage.transcode import EncodeOptions
from pipelines.workers import AHEAD, in_order

CONVERTED_IMAGES = 256
"""How many images are converted, again and again."""
TEACHER = "teacher"
"""The stage of a recipe that runs the teacher on every batch."""
TRAINING_ALONE = ("step", "targets", TEACHER)
"""Stages that asking a teacher does not have."""


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
    jobs, assumptions = [], list(training.assumptions)
    if rate := conversion_rate(bench, capacity.cores, timing):
        images = sum(split.samples for split in bench.dataset.spec.splits.values())
        jobs.append(ClusterJob("converting (one node)", images, rate, CORES))
        assumptions.append("images are converted as they are stored now, in memory: what disks take is not counted")
    if bench.recipe.distill.mode != "none":
        try:
            asking = [*(cost for cost in costs if cost.stage not in TRAINING_ALONE), teacher_cost(bench, costs, timing)]
            asked = predicted(asking, gradients=0)
            jobs.append(ClusterJob("asking the teacher", teacher_views(bench), asked.predicted, asked.limit))
        except UserError as missing:
            assumptions.append(f"the time to ask the teacher is not predicted: {missing.problem}")
    jobs.append(ClusterJob("training", run.images, training.predicted, training.limit))
    return replace(training, jobs=tuple(jobs), assumptions=tuple(assumptions))


def teacher_cost(bench: Workbench, costs: list[Cost], timing: TimingOptions) -> Cost:
    """Return what the teacher costs a view: as measured among `costs`, or alone where training looks its answers up.

    Raises:
        UserError: there is no such teacher.
    """
    for cost in costs:
        if cost.stage == TEACHER:
            return cost
    recipe, inputs = bench.recipe, bench.augmented_to(bench.batch)
    loaded = load_teacher(recipe.distill, bench.dataset.spec.classes)
    teacher = OnlineTeacher(Teacher(loaded, recipe, bench.runtime), recipe)
    call = partial(teacher.get, inputs)
    case = BenchCase(TEACHER, recipe.distill.teacher, "device", len(inputs.labels), call, on_device=True)
    (found,) = measure([case], bench.clock, timing)
    return cost_of(found)


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
