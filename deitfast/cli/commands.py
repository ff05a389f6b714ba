"""What the commands train, teach, eval, export, report and bench do once their options are read."""

import json
import logging
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

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
    CONFUSION_CLASSES,
    agreement_table,
    confusion_table,
    describe_cache,
    describe_run,
    metrics_table,
)
from deitfast.config import recipe as recipes
from deitfast.config.recipe import Recipe, TrainSpec
from deitfast.data_loaders import open_split, typical_side
from deitfast.distill.build_cache import teach
from deitfast.eval.evaluate import agreement, final_head, measured, predict
from deitfast.models.class_names import require_classes
from deitfast.progress import Display
from deitfast.report.write import PAGE, write_report
from deitfast.run_folder import RunFolder
from deitfast.runtime import Runtime, start
from deitfast.train.trainer import train
from deitfast.weights.export import export, format_of
from deitfast.weights.load import TrainedModel, load_file, load_run
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


@dataclass(frozen=True)
class EvalOptions:
    """The options of `deitfast eval`, as typed; None or empty where they were left out."""

    run: Path | None = None
    weights: Path | None = None
    arch: str | None = None
    data: Path | None = None
    split: str = "val"
    ema: bool = False
    loader: str = "auto"
    check: bool = False
    settings: tuple[str, ...] = ()
    json_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what can be refused before anything is opened."""
        if (self.run is None) == (self.weights is None):
            raise UserError("eval needs one network", expected="a run's folder, or --weights FILE")
        if self.run and (self.arch or self.settings):
            raise UserError("--arch and --set go with --weights", expected="a run is evaluated as its recipe says")
        if self.weights and self.data is None:
            raise UserError("--weights without --data", expected="--data FOLDER, a converted data set")

    def precision(self) -> TrainSpec:
        """Return the recipe's section that says in which precision the network computes."""
        if self.run:
            return RunFolder(self.run).recipe().train
        return recipes.override(Recipe(), recipes.parse_settings(self.settings)).train

    def load(self, device: torch.device) -> TrainedModel:
        """Return the network to evaluate."""
        if self.weights:
            arch = recipes.check_arch(self.arch) if self.arch else None
            return load_file(self.weights, arch, recipes.parse_settings(self.settings), device, ema=self.ema)
        return load_run(self.run or Path(), device, ema=self.ema)

    def data_folder(self) -> Path:
        """Return the data set: the one named, else the run's own."""
        return self.data or Path(RunFolder(self.run or Path()).info().data)


def run_evaluation(options: EvalOptions, device: str, display: Display, out: Console) -> None:
    """Evaluate a run's network, or one in a file, and print its metrics; write them to `json_file` as well."""
    with start(options.precision(), device) as runtime:
        trained, folder = options.load(runtime.device), options.data_folder()
        recipe = recipes.override(trained.recipe, {"loader.name": options.loader})
        owner = str(options.run or options.weights)
        with closing(Dataset.open(folder)) as dataset:
            classes = dataset.spec.classes
            require_classes(owner, trained.classes or classes, classes)
            if trained.outputs != len(classes):
                raise UserError(f"{owner} tells {trained.outputs} classes apart, the data set has {len(classes)}")
            name, heads, labels = _predict(trained, dataset, options.split, recipe, runtime, display)
            checked = None
            if options.check:
                slow = recipes.override(recipe, {"loader.name": "reference"})
                _, others, _ = _predict(trained, dataset, options.split, slow, runtime, display)
                checked = agreement(heads, others, labels)
    if not runtime.is_main_process:
        return
    weights = "averaged weights" if options.ema else "weights"
    of = f"{weights} of epoch {trained.epoch}" if trained.epoch else weights
    found = measured(heads, labels)
    title = f"{owner}, {of}, on {folder}, {options.split} ({name} loader)"
    out.print(metrics_table(title, {head: metrics.summary() for head, metrics in found.items()}))
    if checked:
        out.print(agreement_table(name, checked))
    if len(classes) <= CONFUSION_CLASSES:
        out.print(confusion_table(found[final_head(found)], classes))
    if options.json_file:
        tree = {
            "run": owner,
            "split": options.split,
            "classes": classes,
            "weights": weights,
            "epoch": trained.epoch,
            "heads": {head: metrics.everything() for head, metrics in found.items()},
        }
        write_text(options.json_file, json.dumps(tree | ({"check": asdict(checked)} if checked else {})))


def _predict(
    trained: TrainedModel, dataset: Dataset, split: str, recipe: Recipe, runtime: Runtime, display: Display
) -> tuple[str, tuple[Tensor, ...], Tensor]:
    """Return the loader's name, every head's logits and the labels of one pass over a split."""
    loader = open_split(dataset, split, recipe, runtime)
    label = f"evaluating {split} ({loader.name} loader)"
    with closing(loader), display.bar(label, loader.steps_per_epoch) as bar:
        heads, labels = predict(trained.model, loader, recipe, runtime, lambda done, _: bar.reach(done))
    return loader.name, heads, labels


def run_export(run: Path, out_path: Path, form: str, *, ema: bool, out: Console) -> None:
    """Write a run's network for other programs and say where."""
    form = format_of(out_path, form)  # before anything is read
    trained = load_run(run, torch.device("cpu"), ema=ema)
    for file in export(trained, out_path, form):
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)


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
