"""A recipe's stages as cases to measure: each alone, the loader as a whole, and all of training together."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from deitfast.bench.timing import BenchCase, Stall
from deitfast.bench.workbench import BenchLoader, Workbench, describe_targets
from deitfast.interrupt import Stop
from deitfast.train.loop import TrainLoop
from deitfast.train.monitor import Observation
from deitfast.train.state import TrainState
from pipelines.errors import pluralize
from pipelines.loaders.batch_plan import DRAWN_TOGETHER, BatchPlan
from pipelines.loaders.geometry import Geometry, by_image
from pipelines.loaders.host import Codec, HostLoader, decode_window, resize_crop
from pipelines.loaders.prefetch import torch_threads
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams

LEARNING_RATE = 1e-6
"""Of the measured steps; any would do."""


def loader_stages(bench: Workbench) -> list[BenchCase]:
    """Return the loader's stages, each on one thread; none for loaders that do not decode with our threads."""
    loader = bench.loader
    if not isinstance(loader, HostLoader):
        return []
    plan = loader.plan
    rows, params = plan.draw(0, 0)
    crops = Crops(plan, loader.new_codec(), rows, params)
    pixels, views = crops.decode(), len(rows.samples)
    out = plan.allocate(views).numpy()
    checked = "CRC32 compared" if plan.spec.check else "no CRC32 compared"
    once = f", {len(crops.work):,} images for {views:,} views" if len(crops.work) < views else ""

    steps = min(loader.steps_per_epoch, -(-DRAWN_TOGETHER // views))

    def stage(name: str, what: str, call: Callable[[], object]) -> BenchCase:
        return BenchCase(name, what, "loader", views, call, threaded=True)

    def draw() -> None:
        for _ in itertools.islice(plan.draws(0), steps):
            pass

    return [
        BenchCase("drawing", "crops, operations, boxes and mixing partners", "loader", steps * views, draw),
        stage("reading", f"from the page cache, {checked}{once}", crops.read),
        stage("decoding", f"{loader.name}'s codec{once}", crops.decode),
        stage("cropping", f"and resizing to {plan.augment.size} px", lambda: crops.cut(pixels, out)),
    ]


class Crops:
    """One batch's way through a loader that decodes with our threads, stage by stage, on one thread."""

    def __init__(self, plan: BatchPlan, codec: Codec, rows: Rows, params: ViewParams) -> None:
        self._plan, self._codec, self.work = plan, codec, by_image(rows, Geometry.of(params))

    def read(self) -> None:
        """Read every image's stored bytes."""
        for image in self.work:
            self._plan.stored(image.sample)

    def decode(self) -> list[np.ndarray]:
        """Return of each image the region that holds the crops of its views."""
        return [decode_window(self._plan, self._codec, image.sample, *image.window) for image in self.work]

    def cut(self, pixels: list[np.ndarray], out: np.ndarray) -> None:
        """Cut every view out of what `decode` returned and resize it."""
        for image, region in zip(self.work, pixels, strict=True):
            for crop in image.crops:
                resize_crop(self._codec, region, crop, out)


def whole_loader(bench: Workbench, name: str = "loader") -> BenchCase:
    """Return the loader at work with all its threads."""
    batches, prefetched = bench.batches(), bench.recipe.loader.prefetch + 1
    what = f"{bench.loader.name}, {pluralize(bench.workers, 'thread')}, up to the batch on the device"

    def take() -> None:
        next(batches)

    return BenchCase(name, what, "loader", bench.recipe.train.batch, take, prefetched=prefetched, on_device=True)


def copying(bench: Workbench) -> list[BenchCase]:
    """Return the copy of a batch from page-locked memory to the device; none where the host is the device."""
    device = bench.runtime.device
    if device.type != "cuda":
        return []
    host = bench.batch.images.cpu().pin_memory()
    what = f"{host.nbytes / 1e6:,.0f} MB a batch, from page-locked memory"
    call = partial(host.to, device, non_blocking=True)
    return [BenchCase("copying", what, "copy", len(host), call, on_device=True)]


def device_stages(bench: Workbench) -> list[BenchCase]:
    """Return what keeps the device busy for each batch, one after the other."""
    recipe, batch, train_step = bench.recipe, bench.batch, bench.student.train_step
    inputs = bench.inputs(batch)

    def stage(name: str, what: str, call: Callable[[], object]) -> BenchCase:
        return BenchCase(name, what, "device", len(batch.labels), call, on_device=True)

    def augment() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(torch_threads())  # as where batches are made
        try:
            bench.inputs(batch)
        finally:
            torch.set_num_threads(threads)

    stages = [stage("augmentation", "flip, operations, normalize, erase, mix", augment)]
    found = None
    if targets := bench.student.targets:
        found = targets.get(inputs)
        name = "teacher" if targets.needs_teacher else "targets"
        stages.append(stage(name, describe_targets(recipe, targets), lambda: targets.get(inputs)))
    what = f"{recipe.model.arch}: forward, loss, backward, {recipe.optim.name}"
    return [*stages, stage("step", what, lambda: train_step.step(inputs, found, LEARNING_RATE))]


def step_alone(bench: Workbench) -> BenchCase:
    """Return the training step on one augmented batch, its targets known."""
    return device_stages(bench)[-1]


def all_together(bench: Workbench) -> BenchCase:
    """Return the loop that `train` runs, one step a call; each call says how long the device had nothing to work on."""
    loader, steps = bench.loop.loader, training_steps(bench.loop)
    assert isinstance(loader, BenchLoader)

    def train() -> Stall | None:
        next(steps)
        return loader.stall

    return BenchCase(
        "all together",
        "the training loop: loader, augmentation and step",
        None,
        bench.recipe.train.batch,
        train,
        prefetched=bench.recipe.loader.prefetch + 1,
        drop_prefetched=loader.drop,
        on_device=True,
    )


def training_steps(loop: TrainLoop) -> Iterator[Observation | None]:
    """Take the steps of a recipe's epochs, again and again, as `train` does between checkpoints and evaluations."""
    stop, device = Stop(loop.runtime), loop.runtime.device
    for epoch in itertools.cycle(range(loop.recipe.train.epochs)):
        yield from loop.epoch(TrainState.start(device, epoch), stop, lambda: False)
