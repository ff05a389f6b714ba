"""A recipe's stages as work to call over and over: each alone, the loader as a whole, and loader and step together."""

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from deitfast.bench.record import Setting, counted
from deitfast.bench.timing import Clock, Pause, Work
from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.distill.cache_files import is_present
from deitfast.distill.cache_key import target_spec, uses_cache
from deitfast.distill.encoding import decode, encode, from_records
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.environment import environment
from deitfast.models.vit import reads_patches
from deitfast.runtime import Runtime
from deitfast.train.step import TrainStep
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch, Loader
from pipelines.loaders.geometry import Geometry, by_image
from pipelines.loaders.host import Codec, HostLoader, Plan, cut, decoded
from pipelines.rng.sampler import Rows
from pipelines.rng.view_params import ViewParams
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import Reader
from pipelines.workers import usable_cores

LEARNING_RATE = 1e-6
"""Of the measured steps; any would do."""


class Workbench:
    """One recipe on one data set: its loader and its learner, opened when first asked for."""

    def __init__(self, dataset: Dataset, recipe: Recipe, runtime: Runtime) -> None:
        self.dataset, self.recipe, self.runtime = dataset, recipe, runtime
        self.clock = Clock(runtime.device)
        self._batches: Generator[Batch] | None = None

    @property
    def reader(self) -> Reader:
        """The training split."""
        return self.dataset.split("train")

    @property
    def workers(self) -> int:
        """The loader's threads."""
        return self.recipe.loader.workers or self.cores

    @property
    def cores(self) -> int:
        """Cores that this process may use."""
        return usable_cores()

    @cached_property
    def loader(self) -> Loader:
        """The recipe's loader of the training split."""
        return open_training(self.dataset, self.recipe, self.runtime)

    @cached_property
    def learner(self) -> TrainStep:
        """The recipe's network and optimizer."""
        return TrainStep(self.recipe, len(self.dataset.spec.classes), self.runtime)

    @cached_property
    def targets(self) -> "Targets | None":
        """Where the step's distillation targets come from; None without distillation."""
        return distillation_targets(self.recipe, self.dataset, self.runtime)

    @cached_property
    def held(self) -> Batch:
        """A batch to work on."""
        return next(self.batches())

    @cached_property
    def inputs(self) -> AugmentedBatch:
        """The held batch as the step takes it."""
        return self.augmented(self.held)

    def batches(self) -> Generator[Batch]:
        """Return the loader's batches, epoch after epoch: one iteration, whoever asks."""
        if self._batches is None:
            self._batches = _endless(self.loader)
        return self._batches

    def augmented(self, batch: Batch) -> AugmentedBatch:
        """Return what the step takes of a batch."""
        looked_at = self.targets is not None and self.targets.looks
        return self.prepared(batch, patch=0 if looked_at else reads_patches(self.learner.model))

    def prepared(self, batch: Batch, patch: int = 0) -> AugmentedBatch:
        """Return a batch augmented, as pixels or in patches."""
        spec, dtype, kernels = self.recipe.augment, self.runtime.input_dtype, self.recipe.train.kernels
        return augment(batch, spec, dtype=dtype, train=True, patch=patch, kernels=kernels)

    def step(self, inputs: AugmentedBatch) -> None:
        """Train on a batch."""
        self.learner.step(inputs, self.targets.find(inputs) if self.targets else None, LEARNING_RATE, 0)

    def changed(self, settings: list[str], dataset: Dataset | None = None) -> "Workbench":
        """Return a bench with other settings or data, with this one's learner where the loader alone differs."""
        other = Workbench(
            dataset or self.dataset, recipes.override(self.recipe, recipes.parse_settings(settings)), self.runtime
        )
        same = replace(other.recipe, loader=self.recipe.loader) == self.recipe
        if same and other.dataset.spec.classes == self.dataset.spec.classes:
            other.learner, other.targets = self.learner, self.targets
        return other

    def close(self) -> None:
        """End the iteration and the loader."""
        if self._batches is not None:
            self._batches.close()
        if "loader" in self.__dict__:
            self.loader.close()

    def setting(self) -> Setting:
        """Return what is measured."""
        recipe, runtime, spec = self.recipe, self.runtime, self.dataset.spec
        return Setting(
            arch=recipe.model.arch,
            size=recipe.augment.size,
            batch=recipe.train.batch,
            precision=runtime.precision,
            compiled=runtime.compile,
            device=str(runtime.device),
            device_name=_name(runtime.device),
            data=str(self.dataset.folder),
            images=self.reader.num_samples,
            data_bytes=self.reader.file_size,
            max_side=spec.codec.get("max_side", 0),
            loader=self.loader.name,
            workers=self.workers,
            cores=self.cores,
            repeats=recipe.augment.repeats,
        )


@dataclass(frozen=True)
class Targets:
    """Where the targets of a distilled step come from."""

    name: str
    what: str
    find: Callable[[AugmentedBatch], Tensor]
    looks: bool = False
    """Whether a teacher looks at the pixels; else the model may have them in patches."""


def distillation_targets(recipe: Recipe, dataset: Dataset, runtime: Runtime) -> Targets | None:
    """Return the recipe's way to its teacher's answers: looked up, unless the recipe asks the teacher each time."""
    distill, classes = recipe.distill, len(dataset.spec.classes)
    if distill.mode == "none":
        return None
    if not uses_cache(recipe):
        teacher = Teacher(load_teacher(distill, dataset.spec.classes), recipe, runtime)
        spec = target_spec(recipe, dataset)
        find = lambda inputs: decode(encode(teacher.logits(inputs.pixels), spec), spec, classes, distill.tau)  # noqa: E731
        return Targets("teacher", f"{distill.teacher}, in the loop", find, looks=True)
    spec, repeats = target_spec(recipe, dataset), recipe.augment.repeats
    rows = np.zeros((repeats, dataset.split("train").num_samples), spec.record)  # as a full cache's, whatever they say

    def look_up(inputs: AugmentedBatch) -> Tensor:
        records = rows[inputs.params.view % repeats, inputs.params.sample]
        assert is_present(records).all()  # training asks as well
        return decode(from_records(records, runtime.device), spec, classes, distill.tau)

    return Targets("targets", f"{distill.mode}, looked up as from a full teacher cache", look_up)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["processor"]


def _endless(loader: Loader) -> Generator[Batch]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def loader_stages(bench: Workbench) -> list[Work]:
    """Return the loader's stages, each on one thread; none for loaders that do not decode with our threads."""
    loader = bench.loader
    if not isinstance(loader, HostLoader):
        return []
    plan = loader.plan
    rows, params = plan.draw(0, 0)
    crops = Crops(plan, loader.new_codec(), rows, params)
    pixels, views = crops.decode(), len(rows.samples)
    out = plan.canvas(views).numpy()
    checked = "CRC32 compared" if plan.spec.check else "no CRC32 compared"
    once = f", {len(crops.work):,} images for {views:,} views" if len(crops.work) < views else ""

    def stage(name: str, what: str, call: Callable[[], object], *, threaded: bool = True) -> Work:
        return Work(name, what, "loader", views, call, threaded)

    return [
        stage("drawing", "windows, operations, boxes and partners", lambda: plan.draw(0, 0), threaded=False),
        stage("reading", f"from the page cache, {checked}{once}", crops.read),
        stage("decoding", f"{loader.name}'s codec{once}", crops.decode),
        stage("cropping", f"and resizing to {plan.augment.size} px", lambda: crops.cut(pixels, out)),
    ]


class Crops:
    """One batch's way through a loader that decodes with our threads, stage by stage, on one thread."""

    def __init__(self, plan: Plan, codec: Codec, rows: Rows, params: ViewParams) -> None:
        self._plan, self._codec, self.work = plan, codec, by_image(rows, Geometry.of(params))

    def read(self) -> None:
        """Look at every image's stored bytes."""
        for image in self.work:
            self._plan.stored(image.sample)

    def decode(self) -> list[np.ndarray]:
        """Return of each image the window that holds those of its views."""
        return [decoded(self._plan, self._codec, image.sample, *image.window) for image in self.work]

    def cut(self, pixels: list[np.ndarray], out: np.ndarray) -> None:
        """Cut every view out of what `decode` returned and resize it."""
        for image, window in zip(self.work, pixels, strict=True):
            for crop in image.crops:
                cut(self._codec, window, crop, out)


def whole_loader(bench: Workbench, name: str = "loader") -> Work:
    """Return the loader at work with all its threads."""
    batches, ahead = bench.batches(), bench.recipe.loader.prefetch + 1
    what = f"{bench.loader.name}, {counted(bench.workers, 'thread')}, up to the batch on the device"

    def take() -> None:
        next(batches)

    return Work(name, what, "loader", bench.recipe.train.batch, take, ahead=ahead, on_device=True)


def copying(bench: Workbench) -> list[Work]:
    """Return the copy of a batch from page-locked memory to the device; none where the host is the device."""
    device = bench.runtime.device
    if device.type != "cuda":
        return []
    host = bench.held.images.cpu().pin_memory()
    what = f"{host.nbytes / 1e6:,.0f} MB a batch, from page-locked memory"
    call = partial(host.to, device, non_blocking=True)
    return [Work("copying", what, "copy", len(host), call, on_device=True)]


def device_stages(bench: Workbench) -> list[Work]:
    """Return what keeps the device busy for each batch, one after the other."""
    recipe, held, inputs, learner = bench.recipe, bench.held, bench.inputs, bench.learner

    def stage(name: str, what: str, call: Callable[[], object]) -> Work:
        return Work(name, what, "device", len(held.labels), call, on_device=True)

    works = [stage("augmentation", "flip, operations, normalize, erase, mix", lambda: bench.augmented(held))]
    found = None
    if targets := bench.targets:
        found = targets.find(inputs)
        works.append(stage(targets.name, targets.what, lambda: targets.find(inputs)))
    what = f"{recipe.model.arch}: forward, loss, backward, {recipe.optim.name}"
    return [*works, stage("step", what, lambda: learner.step(inputs, found, LEARNING_RATE, 0))]


def all_together(bench: Workbench) -> Work:
    """Return loader and step, as training runs them; each call says how long the device had nothing to work on."""
    batches, clock = bench.batches(), bench.clock

    def train() -> Pause:
        began = clock.mark()
        batch = next(batches)
        pause = Pause(began, clock.mark())  # on CUDA the second mark stands behind the batch's copy
        bench.step(bench.augmented(batch))
        return pause

    return Work(
        "all together",
        "loader and step",
        None,
        bench.recipe.train.batch,
        train,
        ahead=bench.recipe.loader.prefetch + 1,
        drain=lambda: next(batches),
        on_device=True,
    )
