"""One recipe on one data set, opened to be measured: its loader, its network and its distillation targets."""

import gc
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deitfast.bench.record import Setting
from deitfast.bench.timing import Clock
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
from pipelines.storage.dataset import Dataset
from pipelines.storage.reader import Reader
from pipelines.workers import usable_cores


@dataclass(frozen=True)
class BenchTargets:
    """Where the distillation targets of a measured step come from."""

    name: str
    what: str
    find: Callable[[AugmentedBatch], Tensor]
    """Returns the targets of a batch, as `TrainStep.step` takes them."""
    needs_pixels: bool = False
    """Whether a teacher runs on the pixels; otherwise the model may have them in patches."""


class Student:
    """A recipe's network with its optimizer, and its distillation targets; each is built when first needed."""

    def __init__(self, recipe: Recipe, dataset: Dataset, runtime: Runtime) -> None:
        self.recipe, self.dataset, self.runtime = recipe, dataset, runtime
        self._train_step: TrainStep | None = None
        self._targets: BenchTargets | None = None

    @property
    def train_step(self) -> TrainStep:
        """The network and all that trains it."""
        if self._train_step is None:
            self._train_step = TrainStep(self.recipe, len(self.dataset.spec.classes), self.runtime)
        return self._train_step

    @property
    def targets(self) -> BenchTargets | None:
        """Where the step's distillation targets come from; None without distillation."""
        if self._targets is None:
            self._targets = distillation_targets(self.recipe, self.dataset, self.runtime)
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
            self._batches = _endless(self.loader)
        return self._batches

    def augmented(self, batch: Batch) -> AugmentedBatch:
        """Return a batch as the step takes it."""
        targets = self.student.targets
        needs_pixels = targets is not None and targets.needs_pixels
        return self.augmented_to(batch, patch=0 if needs_pixels else reads_patches(self.student.train_step.model))

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
        if self._loader is not None:
            self._loader.close()
        self._batches = self._loader = self._batch = None
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
            data=str(self.dataset.folder),
            images=self.reader.num_samples,
            data_bytes=self.reader.file_size,
            max_side=spec.codec.get("max_side", 0),
            loader=self.loader.name,
            workers=self.workers,
            cores=self.cores,
            repeats=recipe.augment.repeats,
        )


def distillation_targets(recipe: Recipe, dataset: Dataset, runtime: Runtime) -> BenchTargets | None:
    """Return where a recipe's distillation targets come from; None without distillation.

    They are looked up as in a full teacher cache, unless the recipe runs the teacher on every batch.
    """
    distill, classes = recipe.distill, len(dataset.spec.classes)
    if distill.mode == "none":
        return None
    spec, repeats = target_spec(recipe, dataset), recipe.augment.repeats
    if not uses_cache(recipe):
        teacher = Teacher(load_teacher(distill, dataset.spec.classes), recipe, runtime)

        def run_teacher(inputs: AugmentedBatch) -> Tensor:
            return decode(encode(teacher.logits(inputs.pixels), spec), spec, classes, distill.tau)

        return BenchTargets("teacher", f"{distill.teacher}, run on every batch", run_teacher, needs_pixels=True)
    rows = np.zeros((repeats, dataset.split("train").num_samples), spec.record)  # as a full cache's, of any content

    def look_up(inputs: AugmentedBatch) -> Tensor:
        records = rows[inputs.params.view % repeats, inputs.params.sample]
        assert is_present(records).all()  # training checks it as well
        return decode(from_records(records, runtime.device), spec, classes, distill.tau)

    return BenchTargets("targets", f"{distill.mode}, looked up as in a full teacher cache", look_up)


def _endless(loader: Loader) -> Generator[Batch]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)
