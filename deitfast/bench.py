"""`deitfast bench`: how many images a second the loader gives, the step takes, and both do together."""

import itertools
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from deitfast.data import open_training
from deitfast.display import Display
from deitfast.model import reads_patches
from deitfast.recipe import Recipe
from deitfast.runtime import Runtime
from deitfast.step import Learner
from pipelines.augment.chain import ModelInput, augment
from pipelines.batch import Batch, Loader
from pipelines.storage.dataset import Dataset

REPEATS = 5
"""Measurements of each stage, after a warm-up."""
LOADER, STEP, TRAIN = "loader", "step", "all together"
PARTS = {
    "all": (LOADER, "augmentation", STEP, TRAIN),
    "loader": (LOADER,),
    "step": (STEP,),
    "train": (TRAIN,),
}
"""What can be measured, and the stages of it."""


@dataclass(frozen=True)
class Measured:
    """One stage's rates."""

    stage: str
    rates: tuple[float, ...]
    """images/s of each measurement, over all ranks' shares of this one."""

    @property
    def median(self) -> float:
        """The figure to quote, in images/s."""
        return statistics.median(self.rates)


def measure(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, part: str, seconds: float, display: Display
) -> tuple[list[Measured], str]:
    """Return the rates of the stages in `part`, and the loader's name.

    Args:
        dataset: read through the page cache: repeated measurements find its files in memory if they fit.
        recipe: distillation is left out: a teacher in the loop is another model's cost.
        runtime: device and precision.
        part: all, or one of PARTS.
        seconds: least time of one measurement.
        display: shows how far it is.
    """
    names = PARTS[part]
    with closing(open_training(dataset, recipe, runtime)) as loader, closing(_batches(loader)) as fresh:
        stages = _stages(recipe, runtime, len(dataset.spec.classes), fresh, names)
        found = []
        with display.bar("measuring", len(names) * (REPEATS + 1)) as bar:
            for name in names:
                rates = []
                for repeat in range(REPEATS + 1):
                    rate = _rate(stages[name], recipe.train.batch // runtime.world, seconds, runtime)
                    bar.advance(1, f"{name} {rate:,.0f} images/s")
                    if repeat:  # the first is the warm-up
                        rates.append(rate)
                found.append(Measured(name, tuple(rates)))
        return found, loader.name


def _stages(
    recipe: Recipe, runtime: Runtime, classes: int, fresh: Generator[Batch], names: tuple[str, ...]
) -> dict[str, Callable[[], object]]:
    """Return what to call, over and over, for each stage."""
    if names == (LOADER,):
        return {LOADER: lambda: next(fresh)}
    learner = Learner(recipe, classes, runtime)
    held, patch = next(fresh), reads_patches(learner.model)

    def augmented(batch: Batch) -> ModelInput:
        kernels = recipe.train.kernels
        return augment(batch, recipe.augment, dtype=runtime.pixels, train=True, patch=patch, kernels=kernels)

    inputs = augmented(held)
    return {
        LOADER: lambda: next(fresh),
        "augmentation": lambda: augmented(held),
        STEP: lambda: learner.step(inputs, None, 1e-6, 0),
        TRAIN: lambda: learner.step(augmented(next(fresh)), None, 1e-6, 0),
    }


def _batches(loader: Loader) -> Generator[Batch]:
    """Yield a loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def _rate(work: Callable[[], object], batch: int, seconds: float, runtime: Runtime) -> float:
    """Return images/s of `work`, called over and over for at least `seconds`."""
    _synchronise(runtime)
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        work()
        count += 1
        _synchronise(runtime)
    return count * batch / spent


def _synchronise(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def bench_table(measured: tuple[list[Measured], str], recipe: Recipe, data: Path, runtime: Runtime) -> Table:
    """Return the rates as a table, with the slowest stage named."""
    stages, loader = measured
    precision = str(runtime.amp).removeprefix("torch.") if runtime.amp else "float32"
    table = Table(
        title=f"{recipe.model.arch} at {recipe.augment.size} px, batch {recipe.train.batch}, {precision}, "
        f"on {runtime.device}; {data}, loader {loader}",
        title_justify="left",
    )
    table.add_column("stage")
    for column in ("images/s", "lowest", "highest"):
        table.add_column(column, justify="right")
    for stage in stages:
        table.add_row(stage.stage, *(f"{rate:,.0f}" for rate in (stage.median, min(stage.rates), max(stage.rates))))
    table.caption = f"median of {REPEATS} measurements"
    if len(stages) > 1:
        slowest = min(stages[:-1], key=lambda stage: stage.median)
        table.caption += f"; {slowest.stage} is the slowest stage"
    table.caption_justify = "left"
    return table
