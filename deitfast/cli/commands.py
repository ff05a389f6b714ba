"""What the commands train, teach, eval, export, report and bench do once their options are read."""

import logging
import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deitfast.bench.page import page
from deitfast.bench.record import save
from deitfast.bench.run import BenchOptions, benchmark
from deitfast.bench.tables import show
from deitfast.cli.datasets_impl import convert_dataset
from deitfast.cli.options import (
    DEMO_DATA,
    TrainOptions,
    data_folder,
    demo_teacher,
    plan_teaching,
    plan_training,
    training_data,
    uses_demo_teacher,
)
from deitfast.cli.tables import (
    describe_cache,
    describe_run,
)
from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe
from deitfast.data_loaders import typical_side
from deitfast.distill.precompute import teach
from deitfast.progress import Display
from deitfast.report.write import PAGE, write_report
from deitfast.run_folder import RunFolder
from deitfast.runtime import start
from deitfast.train.trainer import train
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.storage.convert.options import ConvertOptions
from pipelines.storage.dataset import SPEC_FILE, Dataset

log = logging.getLogger("deitfast")
CPU_BATCH = 64
"""Images in a batch of `bench` on a CPU at most, where none is named."""


def run_training(options: TrainOptions, device: str, display: Display, out: Console) -> None:
    """Plan and train; make the demo set and its teacher first where they are wanted and missing."""
    data = training_data(options)
    _make_demo_set(data, display)
    job = plan_training(options, data)
    with start(job.recipe.train, device) as runtime:  # once: a process group that was left cannot be joined again
        if uses_demo_teacher(job.recipe) and (lesson := runtime.broadcast_from_rank0(demo_teacher(data))):
            train(lesson, runtime.with_precision(lesson.recipe.train), display)
        train(job, runtime, display)
        if runtime.is_main_process:
            out.print(describe_run(RunFolder(job.out)))


def run_teaching(options: TrainOptions, views: int | None, device: str, display: Display, out: Console) -> None:
    """Plan and fill a teacher cache; make the demo set and its teacher first where they are wanted and missing."""
    data = data_folder(options.data)
    _make_demo_set(data, display)
    job = plan_teaching(options, views, data)
    with start(job.recipe.train, device) as runtime:
        if uses_demo_teacher(job.recipe) and (lesson := runtime.broadcast_from_rank0(demo_teacher(data))):
            train(lesson, runtime.with_precision(lesson.recipe.train), display)
        cache = teach(job, runtime, display)
        if runtime.is_main_process:
            out.print(describe_cache(cache))


def run_report(runs: list[Path], page: Path | None, table: Path | None, out: Console) -> None:
    """Write the report of some runs, warn of what it lacks, and say where it is."""
    page = page or (runs[0] / PAGE if len(runs) == 1 else Path(PAGE))
    table = table or page.with_suffix(".md")
    if page == table:
        raise UserError(f"{page} cannot be both page and table", remedy="name two files with --out and --markdown")
    for remark in write_report(runs, page, table):
        log.warning("%s", remark)
    for file in (page, table):
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class BenchTarget:
    """What `deitfast bench` measures and where it writes, as typed."""

    data: Path | None
    arch: str
    batch: int | None
    settings: tuple[str, ...]
    json_file: Path | None = None
    html_file: Path | None = None

    def recipe(self, dataset: Dataset) -> Recipe:
        """Return the recipe whose stages are measured."""
        recipe = recipes.choose(recipes.check_arch(self.arch), dataset.spec.name, typical_side(dataset))
        given = {"train.batch": self.batch} if self.batch else {}
        return recipes.override(recipe, given | recipes.parse_settings(self.settings))

    def affordable(self, recipe: Recipe, options: BenchOptions) -> tuple[Recipe, BenchOptions]:
        """Return a recipe whose steps a CPU takes in seconds, where no batch was asked for, and a note that says so."""
        named = self.batch or any(setting.startswith("train.batch") for setting in self.settings)
        if named or options.part == "loader" or recipe.train.batch <= CPU_BATCH:
            return recipe, options
        note = f"batch {CPU_BATCH} instead of the recipe's {recipe.train.batch:,}, which takes a CPU minutes"
        return recipes.override(recipe, {"train.batch": CPU_BATCH}), replace(options, notes=(note,))


def run_bench(target: BenchTarget, options: BenchOptions, device: str, display: Display, out: Console) -> None:
    """Measure a recipe's stages on a data set, print what was found, and write it where asked."""
    folder = data_folder(target.data)
    _make_demo_set(folder, display)
    with closing(Dataset.open(folder)) as dataset:
        recipe = target.recipe(dataset)
        with start(recipe.train, device) as runtime:
            if runtime.device.type == "cpu":
                recipe, options = target.affordable(recipe, options)
            found = benchmark(dataset, recipe, runtime, options, display)
    out.print(show(found))
    if target.json_file:
        save(found, target.json_file)
    if target.html_file:
        write_text(target.html_file, page(found))


def _make_demo_set(data: Path, display: Display) -> None:
    """Draw the demo set, on rank 0, where it is wanted and not there yet."""
    if data != DEMO_DATA:
        return
    written = data / SPEC_FILE
    if os.environ.get("RANK", "0") == "0" and not written.exists():
        convert_dataset("demo", None, data, ConvertOptions(), display)
    while not written.exists():
        time.sleep(0.1)
