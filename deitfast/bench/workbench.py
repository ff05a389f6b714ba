"""One recipe on one data set, opened to be measured: its loader, its network and its distillation targets."""

import gc
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import torch

from deitfast.bench.record import Setting
from deitfast.bench.timing import Clock, Stall
from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import open_training
from deitfast.distill.build_cache import TeacherViews
from deitfast.distill.cache import MemoryCache
from deitfast.distill.cache_key import target_spec, uses_cache
from deitfast.distill.cached_teacher import CachedTeacher
from deitfast.distill.targets import CachedTargets, OnlineTeacher, Targets
from deitfast.distill.teacher import Teacher, load_teacher
from deitfast.environment import environment
from deitfast.runtime import Runtime
from deitfast.train.loop import TrainLoop
from deitfast.train.step import StepInputs, TrainStep
from pipelines.augment.chain import AugmentedBatch, augment
from pipelines.batch import Batch, Loader
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import Reader
from pipelines.workers import usable_cores


class Student:
    """A recipe's network with its optimizer, and its distillation targets; each is built when first needed."""

    def __init__(self, recipe: Recipe, dataset: Dataset, runtime: Runtime) -> None:
        self.recipe, self.dataset, self.runtime = recipe, dataset, runtime
        self._train_step: TrainStep | None = None
        self._targets: Targets | None = None

    @property
    def train_step(self) -> TrainStep:
        """The network and all that trains it."""
        if self._train_step is None:
            self._train_step = TrainStep(self.recipe, len(self.dataset.spec.classes), self.runtime)
        return self._train_step

    @property
    def targets(self) -> Targets | None:
        """Where the step's distillation targets come from; None without distillation."""
        if self._targets is None:
            self._targets = bench_targets(self.recipe, self.dataset, self.runtime)
        return self._targets

    def close(self) -> None:
        """Drop the network, and what was compiled for it: torch compiles a function only so often in a process."""
        compiled = self._train_step is not None and self.runtime.compile
        self._train_step = self._targets = None
        if compiled:
            forget_compiled()


def forget_compiled() -> None:
    """Drop everything that torch.compile has made in this process, and the GPU memory that its CUDA graphs hold."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Workbench:
    """One recipe on one data set. Loader and student are opened when first needed, and closed by `close`."""

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        runtime: Runtime,
        student: Student | None = None,
        batch: Batch | None = None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            dataset: what to train on; the caller closes it.
            recipe: what to measure.
            runtime: where, in the recipe's precision.
            student: another workbench's, to train the same network; its owner closes it. None: one of its own.
            batch: what single stages work on; None: the loader's first.
        """
        self.dataset, self.recipe, self.runtime = dataset, recipe, runtime
        self.clock = Clock(runtime.device)
        self.student = student or Student(recipe, dataset, runtime)
        self._owns_student = student is None
        self._loader: Loader | None = None
        self._batches: Generator[Batch] | None = None
        self._loop: TrainLoop | None = None
        self._batch = batch

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

    @property
    def loader(self) -> Loader:
        """The recipe's loader of the training split."""
        if self._loader is None:
            self._loader = open_training(self.dataset, self.recipe, self.runtime)
        return self._loader

    @property
    def batch(self) -> Batch:
        """The batch that single stages work on."""
        if self._batch is None:
            self._batch = next(self.batches())
        return self._batch

    def batches(self) -> Generator[Batch]:
        """Return the loader's batches, epoch after epoch: always the same iteration."""
        if self._batches is None:
            self._batches = endless(self.loader)
        return self._batches

    @property
    def loop(self) -> TrainLoop:
        """The loop that `train` runs, over this workbench's batches."""
        if self._loop is None:
            student = self.student
            self._loop = TrainLoop(self.recipe, self.runtime, BenchLoader(self), student.train_step, student.targets)
        return self._loop

    def inputs(self, batch: Batch) -> StepInputs:
        """Return a batch as the step takes it."""
        return self.loop.inputs(batch, 0)

    def augmented_to(self, batch: Batch, patch: int = 0) -> AugmentedBatch:
        """Return a batch augmented, in patches of that side, or as pixels."""
        spec, dtype, kernels = self.recipe.augment, self.runtime.input_dtype, self.recipe.train.kernels
        return augment(batch, spec, dtype=dtype, train=True, patch=patch, kernels=kernels)

    def changed(self, settings: list[str], dataset: Dataset | None = None) -> "Workbench":
        """Return a workbench with other settings or data; it trains this one's student where only the loader differs.

        Raises:
            UserError: the settings do not fit.
        """
        recipe, dataset = recipes.override(self.recipe, recipes.parse_settings(settings)), dataset or self.dataset
        if replace(recipe, loader=self.recipe.loader) == self.recipe:
            student = self.student if dataset.spec.classes == self.dataset.spec.classes else None
            return Workbench(dataset, recipe, self.runtime, student)
        runtime = self.runtime if recipe.train == self.recipe.train else self.runtime.with_precision(recipe.train)
        return Workbench(dataset, recipe, runtime)

    def close(self) -> None:
        """Close the loader, and the student where it is this workbench's own."""
        if self._batches is not None:
            self._batches.close()
        if self._loop is not None:
            self._loop.loader.close()
        if self._loader is not None:
            self._loader.close()
        self._batches = self._loader = self._batch = self._loop = None
        if self._owns_student:
            self.student.close()

    def setting(self) -> Setting:
        """Return what is measured."""
        recipe, runtime, spec = self.recipe, self.runtime, self.dataset.spec
        cuda = runtime.device.type == "cuda"
        return Setting(
            arch=recipe.model.arch,
            size=recipe.augment.size,
            batch=recipe.train.batch,
            precision=runtime.precision,
            compiled=runtime.compile,
            device=str(runtime.device),
            device_name=torch.cuda.get_device_name(runtime.device) if cuda else environment()["processor"],
            data=str(self.dataset.path),
            images=self.reader.num_samples,
            data_bytes=self.reader.file_size,
            max_side=spec.codec.get("max_side", 0),
            loader=self.loader.name,
            workers=self.workers,
            cores=self.cores,
            repeats=recipe.augment.repeats,
        )


class BenchLoader:
    """A workbench's loader for `TrainLoop`, which says when the device had no batch to work on."""

    def __init__(self, bench: Workbench) -> None:
        self.name, self.steps_per_epoch = bench.loader.name, bench.loader.steps_per_epoch
        self.stall: Stall | None = None
        """The wait for the batch that came last."""
        self._bench = bench
        self._epochs: Generator[Any] | None = None

    def epoch(
        self, epoch: int, start_step: int = 0, *, then: Callable[[Batch], Any] = lambda batch: batch
    ) -> Iterator[Any]:
        """Yield as many batches as an epoch has, of one iteration that goes on: an epoch's start is not measured."""
        if self._epochs is None:
            self._epochs = endless(self._bench.loader, then)
        for _ in range(start_step, self.steps_per_epoch):
            start = self._bench.clock.mark()
            made = next(self._epochs)
            self.stall = Stall(
                start, self._bench.clock.mark()
            )  # on CUDA the second mark stands behind the batch's copy
            yield made

    def drop(self) -> None:
        """Take one of the batches that were made ahead."""
        if self._epochs is not None:
            next(self._epochs)

    def close(self) -> None:
        """End the iteration; the workbench closes its loader."""
        if self._epochs is not None:
            self._epochs.close()


def bench_targets(recipe: Recipe, dataset: Dataset, runtime: Runtime) -> Targets | None:
    """Return where a recipe's distillation targets come from; None without distillation.

    They are looked up as in a full teacher cache, unless the recipe runs the teacher on every batch.
    """
    if recipe.distill.mode == "none":
        return None
    if not uses_cache(recipe):
        return OnlineTeacher(Teacher(load_teacher(recipe.distill, dataset.spec.classes), recipe, runtime), recipe)
    cache = MemoryCache(target_spec(recipe, dataset), recipe.augment.repeats, dataset.split("train").num_samples)
    teacher = CachedTeacher(cache, _no_teacher, runtime.device)
    return CachedTargets(cache, teacher, TeacherViews(recipe, dataset, runtime))


def _no_teacher() -> Teacher:
    raise AssertionError("a full cache has every target")


def describe_targets(recipe: Recipe, targets: Targets) -> str:
    """Return in a few words where targets come from."""
    if targets.needs_teacher:
        return f"{recipe.distill.teacher}, run on every batch"
    return f"{recipe.distill.mode}, looked up as in a full teacher cache"


def endless(loader: Loader, then: Callable[[Batch], Any] = lambda batch: batch) -> Generator[Any]:
    """Yield what `then` makes of a loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch, then=then)
